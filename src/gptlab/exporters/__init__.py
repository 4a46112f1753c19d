"""Export of trained models: Hugging Face, nanoGPT, llm.c, GGUF and ONNX.

Each format is a module with ``write`` and ``check``. An export is compared with its source by the format's own reader,
and the result is written beside it as a certificate and a model card.
"""
