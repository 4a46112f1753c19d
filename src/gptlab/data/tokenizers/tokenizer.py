"""Tokenizers. Each can be serialized to a record, a JSON-compatible dict from which it can be rebuilt."""

import functools
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, Self, cast

import numpy as np
import regex
from numpy.typing import NDArray

from gptlab.config.components import is_component
from gptlab.config.trust import check_trusted
from gptlab.data.config import ComponentTokenizerConfig, TokenizerConfig
from gptlab.data.tokenizers.component import ComponentTokenizer
from gptlab.data.tokenizers.file import load_file_tokenizer, read_file_tokenizer
from gptlab.data.tokenizers.gpt2_vocabulary import gpt2_merges, unicode_to_bytes
from gptlab.data.tokenizers.text import END_OF_TEXT, replace_surrogates
from gptlab.errors import UserError

# Tokenizers whose record has their vocabulary, which depends on a corpus or a file.
STORED = ("characters", "bpe", "file")

# A long sequence of Unicode whitespace, followed by another character.
_WHITE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_SPACE = re.compile(rf"(?<![{_WHITE}])[{_WHITE}]{{{2**18},}}+(?=[^{_WHITE}])")

# A word, number, or sequence of other characters of MAX_WORD characters, in the classes of the pre-tokenizer. Training
# a BPE is quadratic in this length.
MAX_WORD = 1000
_CLASSES = (r"\p{L}", r"\p{N}", r"\p{White_Space}", r"[^\p{White_Space}\p{L}\p{N}]")
LONG_WORD = regex.compile("|".join(f"{characters}{{{MAX_WORD}}}" for characters in _CLASSES))


class Tokenizer(Hashable, Protocol):
    """Interface of all tokenizers."""

    @property
    def vocab_size(self) -> int:
        """Number of token IDs V, including the end-of-text token."""
        ...

    @property
    def end_of_text(self) -> int | None:
        """ID of the end-of-text token, which separates documents, or None if the tokenizer has none."""
        ...

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Returns the token IDs (N,) of ``text``. Encodes special tokens in the text as ordinary text.

        Raises:
            UserError: The text has a character that is not in the vocabulary of a characters tokenizer.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ``ids``, with invalid UTF-8 replaced by U+FFFD and end-of-text tokens spelled out."""
        ...

    def to_bytes(self, ids: Sequence[int]) -> bytes:
        """Returns the UTF-8 bytes of ``ids``, which may begin or end within a character."""
        ...

    def token_bytes(self) -> NDArray[np.int32]:
        """Returns the number of UTF-8 bytes of each token (V,), 0 for the end-of-text token."""
        ...

    def record(self) -> dict[str, Any]:
        """Returns the JSON-compatible record from which ``load_tokenizer`` rebuilds the tokenizer."""
        ...


class BytesTokenizer:
    """Tokenizer with one token ID per byte of UTF-8, and an end-of-text token."""

    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> NDArray[np.uint32]:  # noqa: D102
        return np.frombuffer(replace_surrogates(text).encode(), dtype=np.uint8).astype(np.uint32)

    def decode(self, ids: Sequence[int]) -> str:  # noqa: D102
        return self.to_bytes(ids).decode("utf-8", errors="replace")

    def to_bytes(self, ids: Sequence[int]) -> bytes:  # noqa: D102
        return b"".join(END_OF_TEXT.encode() if i == self.end_of_text else bytes((i,)) for i in ids)

    def token_bytes(self) -> NDArray[np.int32]:  # noqa: D102
        return np.array([1] * 256 + [0], dtype=np.int32)

    def record(self) -> dict[str, Any]:  # noqa: D102
        return {"name": "bytes"}


class CharactersTokenizer:
    """Tokenizer with one token ID per character, as in nanoGPT's character-level data.

    Args:
        characters: Distinct characters in the order of their IDs. ``build_tokenizer`` sorts them by code point.
    """

    end_of_text = None

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self._id = {character: i for i, character in enumerate(characters)}

    @property
    def vocab_size(self) -> int:  # noqa: D102
        return len(self.characters)

    def encode(self, text: str) -> NDArray[np.uint32]:  # noqa: D102
        try:
            return np.fromiter((self._id[character] for character in text), dtype=np.uint32, count=len(text))
        except KeyError as error:
            raise UserError(
                f"The character {error.args[0]!r} is not in the vocabulary of the tokenizer, which has "
                f"{len(self.characters)} characters: {self.characters!r}"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:  # noqa: D102
        return "".join(self.characters[i] for i in ids)

    def to_bytes(self, ids: Sequence[int]) -> bytes:  # noqa: D102
        return self.decode(ids).encode()

    def token_bytes(self) -> NDArray[np.int32]:  # noqa: D102
        return np.array([len(character.encode()) for character in self.characters], dtype=np.int32)

    def record(self) -> dict[str, Any]:  # noqa: D102
        return {"name": "characters", "characters": self.characters}


class GPT2Tokenizer:
    """Byte-level BPE of GPT-2 (Radford et al. 2019, section 2.2), implemented with tiktoken.

    Args:
        vocab_dir: Directory of the vocabulary; see ``gptlab.data.tokenizers.gpt2_vocabulary.gpt2_merges``.

    Raises:
        UserError: The vocabulary cannot be loaded.
    """

    vocab_size = 50257
    end_of_text = 50256

    def __init__(self, vocab_dir: str | None) -> None:
        self.merges = gpt2_merges(vocab_dir)
        import tiktoken  # slow to import, so only after the vocabulary is loaded
        from tiktoken_ext.openai_public import r50k_pat_str

        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=r50k_pat_str,
            mergeable_ranks=self.merges,
            special_tokens={END_OF_TEXT: self.end_of_text},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> NDArray[np.uint32]:  # noqa: D102
        text = replace_surrogates(text)
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # tiktoken cannot backtrack over a million whitespace characters
            # GPT-2's pattern never matches the last one together with those before it.
            cuts = [0, *(space.end() - 1 for space in LONG_SPACE.finditer(text)), len(text)]
            parts = (text[begin:end] for begin, end in pairwise(cuts))
            return np.concatenate([self._encoding.encode_to_numpy(part, disallowed_special=()) for part in parts])

    def decode(self, ids: Sequence[int]) -> str:  # noqa: D102
        return self._encoding.decode(list(ids))

    def to_bytes(self, ids: Sequence[int]) -> bytes:  # noqa: D102
        return self._encoding.decode_bytes(list(ids))

    def token_bytes(self) -> NDArray[np.int32]:  # noqa: D102
        tokens = self._encoding.token_byte_values()
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        lengths[[self._encoding.encode_single_token(token) for token in tokens]] = [len(token) for token in tokens]
        return lengths

    def record(self) -> dict[str, Any]:  # noqa: D102
        return {"name": "gpt2"}


class BPETokenizer:
    """Byte-level BPE trained on the corpus (Sennrich et al. 2016, over bytes as in Radford et al. 2019, section 2.2).

    The last ID is the end-of-text token, which ``encode`` never returns.

    Args:
        trained: Serialized tokenizer (JSON) of the tokenizers library.
    """

    def __init__(self, trained: str) -> None:
        from tokenizers import Tokenizer as Trained  # slow to import and only needed for this tokenizer

        self.trained = trained
        self._bpe = Trained.from_str(trained)
        self.end_of_text = self._bpe.get_vocab_size()
        self.vocab_size = self.end_of_text + 1

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Trains a tokenizer on ``texts`` with at most ``vocab_size`` token IDs, including the end-of-text token.

        Text without white space, such as DNA, is divided after every ``MAX_WORD`` characters.
        """
        from tokenizers import pre_tokenizers, trainers

        bpe = empty_bpe()
        alphabet = pre_tokenizers.ByteLevel.alphabet()  # all bytes, so that any text can be encoded
        bpe.train_from_iterator(
            (part for text in texts for part in _divide_long_words(replace_surrogates(text))),
            trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False),
        )
        return cls(bpe.to_str())

    def encode(self, text: str) -> NDArray[np.uint32]:  # noqa: D102
        return np.array(self._bpe.encode(replace_surrogates(text)).ids, dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:  # noqa: D102
        return self.to_bytes(ids).decode("utf-8", errors="replace")

    def to_bytes(self, ids: Sequence[int]) -> bytes:  # noqa: D102
        return b"".join(END_OF_TEXT.encode() if i == self.end_of_text else self._bytes_of[i] for i in ids)

    def token_bytes(self) -> NDArray[np.int32]:  # noqa: D102
        return np.array([*(len(token) for token in self._bytes_of), 0], dtype=np.int32)

    def record(self) -> dict[str, Any]:  # noqa: D102
        return {"name": "bpe", "trained": self.trained}

    @cached_property
    def _bytes_of(self) -> list[bytes]:
        """Bytes of each token except the last."""
        ids = self._bpe.get_vocab()
        return [unicode_to_bytes(token) for token in sorted(ids, key=lambda token: ids[token])]


def _divide_long_words(text: str) -> Iterator[str]:
    """Divides a text after every ``MAX_WORD`` characters of a word."""
    begin = 0
    for word in LONG_WORD.finditer(text):
        yield text[begin : word.end()]
        begin = word.end()
    yield text[begin:]


def empty_bpe() -> Any:
    """Builds an empty byte-level BPE of the tokenizers library."""
    from tokenizers import Tokenizer as Trained
    from tokenizers import decoders, models, pre_tokenizers

    bpe = Trained(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Returns the token IDs of ``prompt``, or of the start of a document if it is empty.

    A document starts after an end-of-text token or, if the tokenizer has none, after a newline.
    """
    if prompt:
        return tokenizer.encode(prompt).tolist()
    if tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    try:
        return tokenizer.encode("\n").tolist()
    except (UserError, LookupError, ValueError):  # the latter from a custom tokenizer
        return [0]  # the vocabulary has no newline, and the model needs at least one token


def build_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Builds the tokenizer of a config.

    Args:
        config: Config of the tokenizer.
        texts: All texts of the corpus for "characters", the training texts for "bpe". Not read by other tokenizers.

    Raises:
        UserError: The vocabulary of GPT-2 or the file cannot be loaded, or the component is not a valid tokenizer.
    """
    if isinstance(config, ComponentTokenizerConfig):
        return _component(config.component)
    if config.name == "file":
        named = f"tokenizer.path={config.path}"
        return read_file_tokenizer(Path(config.path or "").expanduser(), config.end_of_text, named)
    if config.name == "characters":
        found: set[str] = set()
        for text in texts:
            found.update(text)
        return CharactersTokenizer("".join(sorted(found)))
    if config.name == "bpe":
        assert config.vocab_size is not None  # noqa: S101  (validated by BuiltInTokenizerConfig)
        return BPETokenizer.train(texts, config.vocab_size)
    return rebuild_tokenizer({"name": config.name}, config.vocab_dir)


def load_tokenizer(record: dict[str, Any], vocab_dir: str | None, origin: object = "the stored data") -> Tokenizer:
    """Builds a tokenizer from a stored record. The package of a component must be trusted.

    Args:
        record: Result of ``Tokenizer.record``.
        vocab_dir: Directory of GPT-2's vocabulary, or None.
        origin: File or directory that the record is from, for messages.

    Raises:
        UserError: The vocabulary of GPT-2 cannot be loaded; a component is not trusted, or has another vocabulary; or
            the record is damaged.
    """
    check_trusted({"tokenizer": record.get("component")}, origin)
    try:
        tokenizer = rebuild_tokenizer(record, vocab_dir)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises Exception
        if "component" in record:
            raise
        raise UserError(f"The tokenizer of {origin} is damaged: {error!r:.300}.") from error
    if "component" in record and tokenizer.record() != record:
        raise UserError(
            f"The tokenizer {record['name']} does not have the vocabulary with which {origin} was written: its code or "
            "its files have changed since."
        )
    return tokenizer


def rebuild_tokenizer(record: dict[str, Any], vocab_dir: str | None) -> Tokenizer:
    """Builds a tokenizer from the record of a tokenizer of this configuration, whose component is trusted.

    Args:
        record: Result of ``Tokenizer.record``.
        vocab_dir: Directory of GPT-2's vocabulary, or None.

    Raises:
        UserError: The vocabulary of GPT-2 cannot be loaded, or the component is not a valid tokenizer.
    """
    if "component" in record:
        return _component(record["component"])
    if record["name"] == "bytes":
        return BytesTokenizer()
    if record["name"] == "characters":
        return CharactersTokenizer(record["characters"])
    if record["name"] == "bpe":
        return BPETokenizer(record["trained"])
    if record["name"] == "file":
        return load_file_tokenizer(record)
    return _gpt2(vocab_dir)


def _component(component: object) -> Tokenizer:
    if not is_component(component):
        raise UserError(f"tokenizer={component!r} is not a component: it has no _target_.")
    return ComponentTokenizer(cast(dict[str, Any], component))


_gpt2 = functools.lru_cache(maxsize=1)(GPT2Tokenizer)  # takes about 0.1 s and is needed several times
