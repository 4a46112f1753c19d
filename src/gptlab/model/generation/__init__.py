"""Text generation: the KV cache, sampling, and models prepared for inference.

This package generates token IDs; ``gptlab.pretrained.text_generator`` decodes them to text.
"""
