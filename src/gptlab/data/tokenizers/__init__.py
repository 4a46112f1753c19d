"""Tokenizers: bytes, characters, GPT-2's BPE and trained BPE.

Also contains conversion from and to the tokenizer files of other programs, the loader of GPT-2's vocabulary, a faster
encoder for preparation, and streaming decoding.
"""
