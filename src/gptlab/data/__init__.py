"""Data pipeline: splits and tokenizes a corpus into cached token shards, and reads them as batches in a fixed order.

``prepare`` writes the shards, ``shards`` reads them, ``order`` maps positions to windows, and ``batches`` builds the
micro-batches of a rank. Imports neither Lightning nor Hydra; only ``batches`` imports torch.
"""
