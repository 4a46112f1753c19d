"""gptlab: a Lightning + Hydra experiment framework for GPT-2 class language models."""
