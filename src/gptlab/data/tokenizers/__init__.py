"""Tokenizers: bytes, characters, GPT-2's BPE and trained BPE.

Also the tokenizers in other programs' files, GPT-2's vocabulary, a faster encoder for preparation, and streaming
decoding.
"""
