"""From a corpus to batches: text is split, tokenized and written as token shards, once, and read in a fixed order.

``prepare`` writes the shards, ``shards`` reads them, ``order`` says which window is at which position, and ``batches``
cuts a rank's share. No Lightning, no Hydra; only ``batches`` imports torch.
"""
