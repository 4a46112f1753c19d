"""Tokenizers, their vocabularies, and text from streams of ids."""
