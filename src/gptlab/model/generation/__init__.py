"""Text generation: KV cache, sampling, and models prepared for inference."""
