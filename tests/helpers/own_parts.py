"""A user's package with a reader and tokenizers, as in docs/data.md."""

import sys
from pathlib import Path

from gptlab.config import components

READERS = '''
import json
from collections.abc import Iterator
from pathlib import Path

from gptlab.data.sources.component import DocumentReader


class Pages(DocumentReader):
    """Pages of a text file that are separated by lines."""

    def __init__(self, path: str, separator: str = "---") -> None:
        self.path, self.separator = Path(path), separator

    def documents(self) -> Iterator[str]:
        yield from self.path.read_text().split(f"\\n{self.separator}\\n")


class Watched(Pages):
    def fingerprint(self) -> str:
        return str(self.path.stat().st_mtime_ns)


class Named(DocumentReader):
    """Records of a .jsonl file with the names that data=text gives them."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def documents(self) -> Iterator[tuple[str, str]]:
        offset = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            yield f"{self.path.name}:{offset}", json.loads(line)["text"]
            offset += len(line)


class Numbers(DocumentReader):
    def documents(self):
        yield "a text"
        yield 3


class Empty(DocumentReader):
    def documents(self):
        return iter(())


class Failing(DocumentReader):
    def documents(self):
        yield "a text"
        raise ZeroDivisionError("a bug in the reader")


class Unfinished(DocumentReader):
    pass


class Unrelated:
    def documents(self):
        yield "a text"
'''

TOKENIZERS = '''
from collections.abc import Sequence

from gptlab.data.tokenizers.component import CustomTokenizer


class Utf8(CustomTokenizer):
    """The tokens of tokenizer=bytes, shifted."""

    vocab_size = 257

    def __init__(self, shift: int = 0) -> None:
        self.shift, self.end_of_text = shift, (256 + shift) % 257

    def encode(self, text: str) -> list[int]:
        return [(byte + self.shift) % 257 for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.id_to_bytes, ids)).decode(errors="replace")

    def id_to_bytes(self, token_id: int) -> bytes:
        return bytes(((token_id - self.shift) % 257,))


class Words(CustomTokenizer):
    """Words of a file, one per line, and the space."""

    def __init__(self, words: str) -> None:
        with open(words) as file:
            self.words = [" ", *file.read().split()]
        self.vocab_size = len(self.words)

    def encode(self, text: str) -> list[int]:
        return [self.words.index(word) for part in text.split(" ") for word in (part, " ") if word][:-1]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.words[i] for i in ids)


class Lossy(Utf8):
    def encode(self, text: str) -> list[int]:
        return super().encode(text.replace("7", "8"))


class TooLarge(Utf8):
    def encode(self, text: str) -> list[int]:
        return [300, *super().encode(text)]


class Ending(Utf8):
    def encode(self, text: str) -> list[int]:
        return [*super().encode(text), 256]


class Split(Utf8):
    """Tokens are parts of characters, but id_to_bytes does not say so."""

    def id_to_bytes(self, token_id: int) -> bytes:
        return CustomTokenizer.id_to_bytes(self, token_id)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


class Sizeless(Utf8):
    vocab_size = None


class Unfinished(CustomTokenizer):
    vocab_size = 3

    def encode(self, text: str) -> list[int]:
        return []
'''


def write_package(folder: Path, name: str = "mylab") -> Path:
    """Writes the package and returns its directory."""
    package = folder / name
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "readers.py").write_text(READERS)
    (package / "tokenizers.py").write_text(TOKENIZERS)
    return package


def forget(name: str = "mylab") -> None:
    """Removes a package from the imported ones, as if the next call were in a new process."""
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]
    components._hash_file.cache_clear()


def write_pages(path: Path, number: int = 200) -> Path:
    """Writes a text with pages for the reader ``Pages``."""
    path.write_text("\n---\n".join(f"Page {n}: " + f"naïve 👍 text {n * n}. " * (n % 7 + 1) for n in range(number)))
    return path
