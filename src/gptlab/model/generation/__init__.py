"""Text generation: the KV cache, sampling, and models prepared for inference.

A model generates token ids here; ``gptlab.pretrained.text_generator`` turns them into text.
"""
