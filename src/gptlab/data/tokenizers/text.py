"""Text of tokenizers: the end-of-text token, and text that UTF-8 can encode."""

END_OF_TEXT = "<|endoftext|>"


def replace_surrogates(text: str) -> str:
    """Replaces lone surrogates, which cannot be encoded in UTF-8, with "?"."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text
