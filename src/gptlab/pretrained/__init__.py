"""Where weights come from: runs, Hugging Face, nanoGPT; and the Python API, ``gptlab.load``."""
