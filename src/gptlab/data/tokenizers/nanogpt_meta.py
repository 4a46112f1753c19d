"""nanoGPT's meta.pkl: which character each id of its character data stands for."""

import pickle
from pathlib import Path
from typing import Any, Never

from gptlab.data.tokenizers.tokenizer import CharactersTokenizer, replace_surrogates
from gptlab.errors import UserError

META_FILE = "meta.pkl"  # beside the train.bin and val.bin that nanoGPT's data/shakespeare_char/prepare.py writes
MAX_BYTES = 2**26  # every character of Unicode, twice, takes less


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers and text. What a pickle does beyond that begins with naming a class or a function."""

    def find_class(self, module: str, name: str) -> Never:
        """Refuse: nothing can be called that cannot be named."""
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no plain data and could run any code")


def read_meta(path: Path) -> CharactersTokenizer:
    """Build the tokenizer that a meta.pkl describes; no code in it is run.

    Raises:
        UserError: It holds anything but a character for each id.
    """
    meta = _load_plain(path)
    itos = meta.get("itos") if isinstance(meta, dict) else None
    if not isinstance(itos, dict) or not all(_is_character(text) for text in itos.values()):
        raise UserError(f"{path} does not say which characters the tokens are: it has no table itos from ids to them.")
    if set(itos) != set(range(len(itos))) or len(set(itos.values())) < len(itos):
        raise UserError(f"{path} does not give each id from 0 to {len(itos) - 1} a character of its own.")
    return CharactersTokenizer("".join(itos[number] for number in range(len(itos))))


def _is_character(text: Any) -> bool:
    return isinstance(text, str) and len(text) == 1 and replace_surrogates(text) == text


def _load_plain(path: Path) -> Any:
    """Unpickle plain data."""
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"{path} has {size:,} bytes, which no table of characters needs.")
    with path.open("rb") as file:
        try:
            return _PlainUnpickler(file).load()
        except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
            raise UserError(f"{path} is refused: {error}.") from error
