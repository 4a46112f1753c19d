"""Export of trained models: Hugging Face, nanoGPT, llm.c, GGUF and ONNX.

Each format is a module with ``write`` and ``check``. ``check`` loads the export with a reader of the format and
compares it with its source. The result is saved with the export as a certificate and in the model card.
"""
