"""Measurements of gptlab beside what people do without it: python -m gptlab.bench."""
