"""Tokenizers from files: tokenizer.json of the tokenizers library, directories of transformers, SentencePiece models.

The libraries themselves encode and decode, so that the token IDs are theirs. No code of the directory is run.
"""

import base64
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptlab.data.tokenizers.gpt2_vocabulary import unicode_to_bytes
from gptlab.data.tokenizers.text import END_OF_TEXT, decode_parts, replace_surrogates
from gptlab.errors import UserError, failure_reason, first_line, install_extra
from gptlab.files import MAX_BYTES, read_regular
from gptlab.parsing import parse_json

TOKENIZER, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
SENTENCEPIECE = ".model"  # suffix
# end-of-text tokens, if the files name none, in this order
END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
MAX_TOKENS = 2**32  # token IDs are stored as uint32
MAX_UNUSED = 4  # ratio of the largest token ID to the number of tokens; the embedding has a row for every ID
SPACE = "\u2581"  # of SentencePiece
BYTE = re.compile("<0x([0-9A-F]{2})>")


class FileTokenizer(ABC):
    """Base class of the tokenizers of files.

    Args:
        record: Record of the tokenizer, with the content of its file.
    """

    vocab_size: int
    special: set[int]  # IDs that are not text
    unknown: int | None  # ID of a text that has no token

    def __init__(self, record: dict[str, Any]) -> None:
        self._record = record
        self.end_of_text: int | None = record["end_of_text"]

    @property
    def can_be_divided(self) -> bool:
        """Whether a text that is divided before whitespace has the token IDs of the whole text."""
        return False

    @property
    @abstractmethod
    def bytes_of(self) -> list[bytes]:
        """UTF-8 bytes of each token (V,)."""

    @abstractmethod
    def encode(self, text: str) -> NDArray[np.uint32]:
        """Returns the token IDs (N,) of a text."""

    @abstractmethod
    def decode_text(self, ids: list[int]) -> str:
        """Returns the text of token IDs that are no end-of-text token."""

    def decode(self, ids: Sequence[int]) -> str:  # noqa: D102
        return decode_parts(ids, self.end_of_text, self.decode_text)

    def to_bytes(self, ids: Sequence[int]) -> bytes:  # noqa: D102
        return b"".join(END_OF_TEXT.encode() if i == self.end_of_text else self.bytes_of[i] for i in ids)

    def token_bytes(self) -> NDArray[np.int32]:
        """Returns the number of UTF-8 bytes of each token (V,): 0 for special tokens, 1 for the unknown token."""
        lengths = np.array([len(token) for token in self.bytes_of], dtype=np.int32)
        lengths[sorted(self.special)] = 0
        if self.unknown is not None:
            lengths[self.unknown] = 1
        return lengths

    def record(self) -> dict[str, Any]:  # noqa: D102
        return self._record


class JSONTokenizer(FileTokenizer):
    """Tokenizer of a tokenizer.json, encoded with the tokenizers library without special tokens.

    If the model itself makes a special token of its spelling, as Unigram does, the token is replaced by those of its
    characters, since a special token in a text is ordinary text.

    Attributes:
        tokens: Token by ID.
        added: Text of each added token by ID.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__(record)
        from tokenizers import Tokenizer as Loaded  # slow to import and only needed for this tokenizer

        self.json = str(record["json"])
        self.described: dict[str, Any] = parse_json(self.json)
        self._loaded = Loaded.from_str(self.json)
        self._loaded.no_truncation()
        self._loaded.no_padding()
        self._loaded.encode_special_tokens = True
        self.tokens = {i: token for token, i in self._loaded.get_vocab(with_added_tokens=True).items()}
        self.vocab_size = max(self.tokens, default=-1) + 1
        unknown = self.described["model"].get("unk_token")
        self.unknown = self._loaded.token_to_id(unknown) if unknown else self.described["model"].get("unk_id")
        added = self._loaded.get_added_tokens_decoder()
        self.special = {i for i, token in added.items() if token.special} - {self.unknown}
        self.added = {i: token.content for i, token in added.items()}

    @property
    def can_be_divided(self) -> bool:  # noqa: D102
        split = self.described.get("pre_tokenizer") or {}
        plain = split.get("type") == "ByteLevel" and not split.get("add_prefix_space") and split.get("use_regex", True)
        return bool(plain) and self.described.get("normalizer") is None and set(self.added) <= self.special

    @property
    def end_token(self) -> str | None:
        """The end-of-text token."""
        return None if self.end_of_text is None else self.tokens[self.end_of_text]

    def encode(self, text: str) -> NDArray[np.uint32]:  # noqa: D102
        text = replace_surrogates(text)
        with _errors_of_library("The text {!r:.40} cannot be encoded", text):
            ids = np.array(self._loaded.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
        if not np.isin(ids, list(self.special)).any():
            return ids
        return np.array([part for i in ids.tolist() for part in self._spelled.get(i, [i])], dtype=np.uint32)

    def decode_text(self, ids: list[int]) -> str:  # noqa: D102
        return str(self._loaded.decode(ids, skip_special_tokens=False))

    @cached_property
    def _spelled(self) -> dict[int, list[int]]:
        """The IDs of the characters of each special token."""
        model = self._loaded.model
        return {
            i: [token.id for character in self.tokens[i] for token in model.tokenize(character)] for i in self.special
        }

    @cached_property
    def bytes_of(self) -> list[bytes]:  # noqa: D102
        to_bytes = _byte_decoder(self.described.get("decoder"))
        return [
            self.added[i].encode() if i in self.added else to_bytes(self.tokens.get(i, ""))
            for i in range(self.vocab_size)
        ]


class SentencePieceTokenizer(FileTokenizer):
    """Tokenizer of a SentencePiece model, encoded with the sentencepiece package."""

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__(record)
        self._loaded = _load_sentencepiece(base64.b64decode(record["sentencepiece"]))
        self.vocab_size = self._loaded.vocab_size()
        numbers = range(self.vocab_size)
        self.special = {i for i in numbers if self._loaded.is_control(i) or self._loaded.is_unused(i)}
        self.unknown = unknown if (unknown := self._loaded.unk_id()) >= 0 else None

    def encode(self, text: str) -> NDArray[np.uint32]:  # noqa: D102
        ids = self._loaded.encode(replace_surrogates(text), add_bos=False, add_eos=False, enable_sampling=False)
        return np.array(ids, dtype=np.uint32)

    def decode_text(self, ids: list[int]) -> str:  # noqa: D102
        return str(self._loaded.decode(ids))

    @cached_property
    def bytes_of(self) -> list[bytes]:  # noqa: D102
        pieces = self._loaded.id_to_piece(list(range(self.vocab_size)))
        return [
            bytes.fromhex(piece[3:5]) if self._loaded.is_byte(i) else piece.replace(SPACE, " ").encode()
            for i, piece in enumerate(pieces)
        ]


def load_file_tokenizer(record: dict[str, Any]) -> FileTokenizer:
    """Builds the tokenizer of a record. Raises UserError if it needs a package that is not installed."""
    return SentencePieceTokenizer(record) if "sentencepiece" in record else JSONTokenizer(record)


def read_file_tokenizer(path: Path, end_of_text: str | None, named: str | None = None) -> FileTokenizer:
    """Reads a tokenizer.json, a directory that has one, or a SentencePiece model.

    Args:
        path: The file or the directory.
        end_of_text: The end-of-text token. None: eos_token of the other files of the directory, or else the first
            special token that is in ``END_TOKENS``.
        named: Override that names the path, for messages.

    Raises:
        UserError: The file is missing or damaged, has a part that gptlab does not support, or has no such token.
    """
    named = named or str(path)
    if path.is_dir():
        file = path / TOKENIZER
        if not file.is_file():
            models = sorted(path.glob(f"*{SENTENCEPIECE}"))
            if not models and (path / VOCABULARY).is_file() and (path / MERGES).is_file():
                return _described(path, _gpt2_files(path), end_of_text, named)
            if len(models) != 1:
                found = f"{len(models)} SentencePiece models" if models else f"no {TOKENIZER}"
                raise UserError(
                    f"{named} has {found}. It should be a {TOKENIZER}, a directory with one, or a SentencePiece "
                    f"{SENTENCEPIECE}. save_pretrained of transformers writes {TOKENIZER}."
                )
            file = models[0]
    elif path.is_file():
        file = path
    else:
        raise UserError(f"{named} does not exist (working directory: {Path.cwd()}).")
    if file.suffix == SENTENCEPIECE:
        return _sentencepiece(file, end_of_text, named)
    return _described(file.parent, read_json(file), end_of_text, named)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises UserError if the file cannot be read or contains something else."""
    try:
        described = parse_json(read_regular(path, follow=True))  # a link in the cache of huggingface_hub
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {failure_reason(error)}.") from error
    if not isinstance(described, dict):
        raise UserError(f"{path} is not a JSON object.")
    return described


def _described(folder: Path, described: dict[str, Any], end_of_text: str | None, named: str) -> FileTokenizer:
    """Builds the tokenizer of the content of a tokenizer.json, whose directory may have further files."""
    if not isinstance(described.get("model"), dict):
        raise UserError(f"{named} is not a {TOKENIZER} of the tokenizers library: it has no `model`.")
    _check_size(described, named)
    settings = {
        name: read_json(folder / name) for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS) if (folder / name).is_file()
    }
    if parts := list(_unsupported(described, settings.get(TOKENIZER_CONFIG, {}))):
        raise UserError(f"{named} is not a supported tokenizer: {'; '.join(parts)}.")
    record = {"name": "file", "json": json.dumps(described, ensure_ascii=False), "end_of_text": None}
    with _errors_of_library("{} cannot be read by the tokenizers library", named):
        tokenizer = JSONTokenizer(record)
    ids = {token: i for i, token in tokenizer.tokens.items()}
    special = [token for token in END_TOKENS if ids.get(token) in tokenizer.special]
    stated = (_content(values.get("eos_token")) for values in settings.values())
    end = end_of_text or next((token for token in stated if token), special[0] if special else None)
    if tokenizer.special if end is None else ids.get(end) not in tokenizer.special:
        known = ", ".join(repr(tokenizer.added[i]) for i in sorted(tokenizer.special)[:8])
        problem = f"{end!r} is not a special token of {named}" if end else f"{named} does not name an end-of-text token"
        raise UserError(f"tokenizer.end_of_text: {problem}. Its special tokens: {known or 'none'}.")
    return JSONTokenizer({**record, "end_of_text": ids[end] if end is not None else None})


def _check_size(described: Mapping[str, Any], named: str) -> None:
    """Raises UserError if token IDs do not fit into 32 bits, or if most IDs have no token."""
    vocabulary = described["model"].get("vocab") or {}
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [*range(len(vocabulary))]
    ids += [token.get("id") for token in described.get("added_tokens") or []]
    if not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise UserError(f"{named} is not a supported tokenizer: `model.vocab` does not map tokens to token IDs.")
    if max(ids) >= MAX_TOKENS:
        raise UserError(f"{named} has the token ID {max(ids):,}, but token IDs must be less than 2^32.")
    if max(ids) >= MAX_UNUSED * len(set(ids)):
        raise UserError(
            f"{named} has {len(set(ids)):,} tokens, but the token ID {max(ids):,}. The embedding would have a row for "
            "each unused ID. Number the tokens from 0."
        )


def _unsupported(described: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    """Yields the parts of a tokenizer whose token IDs or texts gptlab could not reproduce."""
    if described["model"].get("dropout"):
        yield f"model.dropout={described['model']['dropout']}, which makes token IDs random"
    for part in _parts(described.get("decoder"), "decoders"):
        if part.get("type") not in _STEPS:
            yield f"decoder={part.get('type')}"
    for part in _parts(described.get("decoder"), "decoders"):
        if part.get("type") == "Replace" and "String" not in part.get("pattern", {}):
            yield "decoder=Replace of a regular expression"
    added = {token.get("id"): token.get("content") for token in described.get("added_tokens") or []}
    listed = settings.get("added_tokens_decoder") or {}
    if more := [_content(token) for i, token in listed.items() if added.get(int(i)) != _content(token)]:
        yield f"{TOKENIZER_CONFIG} adds {', '.join(map(repr, more[:3]))}, which {TOKENIZER} does not have"
    split = described.get("pre_tokenizer") or {}
    wanted = settings.get("add_prefix_space")
    if split.get("type") == "ByteLevel" and wanted is not None and wanted != split.get("add_prefix_space"):
        yield f"add_prefix_space={json.dumps(wanted)} in {TOKENIZER_CONFIG} differs from {TOKENIZER}"


@contextmanager
def _errors_of_library(problem: str, subject: str) -> Iterator[None]:
    """Converts errors of the tokenizers library, which raises Exception and, for a panic, BaseException."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise UserError(f"{problem.format(subject)}: {first_line(error):.300}.") from error


def _content(token: object) -> str | None:
    """Returns the text of a token in the files of transformers, which is a string or an object."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _parts(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """Returns the elements of a part that may be a sequence."""
    if part is None:
        return []
    if part.get("type") == "Sequence":
        return [inner for element in part.get(key, []) for inner in _parts(element, key)]
    return [part]


def _byte_fallback(token: str | bytes, _: Mapping[str, Any]) -> str | bytes:
    found = BYTE.fullmatch(token) if isinstance(token, str) else None
    return bytes.fromhex(found[1]) if found else token


def _byte_level(token: str | bytes, _: Mapping[str, Any]) -> str | bytes:
    try:
        return unicode_to_bytes(token) if isinstance(token, str) else token
    except KeyError:  # not a token of bytes
        return token


def _word_piece(token: str | bytes, part: Mapping[str, Any]) -> str | bytes:
    prefix = part["prefix"]
    if isinstance(token, bytes):
        return token
    return token.removeprefix(prefix) if token.startswith(prefix) else f" {token}"


def _replace(token: str | bytes, old: str, new: str) -> str | bytes:
    return token.replace(old, new) if isinstance(token, str) else token


# Decoding of one token by each decoder. Strip only concerns the beginning or the end of a text.
_STEPS: dict[str, Callable[[str | bytes, Mapping[str, Any]], str | bytes]] = {
    "ByteLevel": _byte_level,
    "ByteFallback": _byte_fallback,
    "Fuse": lambda token, _: token,
    "Strip": lambda token, _: token,
    "Replace": lambda token, part: _replace(token, part["pattern"]["String"], part["content"]),
    "Metaspace": lambda token, part: _replace(token, part["replacement"], " "),
    "BPEDecoder": lambda token, part: _replace(token, part["suffix"], " "),
    "WordPiece": _word_piece,
}


def _byte_decoder(decoder: Mapping[str, Any] | None) -> Callable[[str], bytes]:
    """Returns the function from a token within a text to its UTF-8 bytes."""
    parts = _parts(decoder, "decoders")

    def to_bytes(token: str) -> bytes:
        value: str | bytes = token if parts else f" {token}"  # without a decoder, tokens are joined by spaces
        for part in parts:
            value = _STEPS[part["type"]](value, part)
        return value.encode() if isinstance(value, str) else value

    return to_bytes


def _gpt2_files(folder: Path) -> dict[str, Any]:
    """Returns the tokenizer.json of the vocab.json and merges.txt of a byte-level BPE."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Loaded

    if (folder / ADDED_TOKENS).is_file():
        raise UserError(f"{folder} is not a supported tokenizer: {ADDED_TOKENS} without {TOKENIZER}.")
    for name in (VOCABULARY, MERGES):
        if (size := (folder / name).stat().st_size) > MAX_BYTES:
            raise UserError(
                f"{folder / name} has {size:,} bytes, which is too large for the vocabulary of a tokenizer."
            )
    try:
        bpe = Loaded(models.BPE(*models.BPE.read_file(str(folder / VOCABULARY), str(folder / MERGES))))
    except Exception as error:  # the tokenizers library raises Exception
        files = f"{VOCABULARY} or {MERGES} of {folder}"
        raise UserError(f"{files} is damaged, and cannot be read as a BPE tokenizer: {first_line(error)}") from error
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    if bpe.token_to_id(END_OF_TEXT) is not None:
        bpe.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    described: dict[str, Any] = json.loads(bpe.to_str())
    return described


def _sentencepiece(file: Path, end_of_text: str | None, named: str) -> FileTokenizer:
    if (size := file.stat().st_size) > MAX_BYTES:
        raise UserError(f"{file} has {size:,} bytes, which is too large for the vocabulary of a tokenizer.")
    content = file.read_bytes()
    try:
        loaded = _load_sentencepiece(content)
    except UserError:
        raise
    except Exception as error:  # the package raises RuntimeError and others
        raise UserError(f"{named} is not a SentencePiece model: {first_line(error):.200}.") from error
    end = loaded.eos_id() if end_of_text is None else loaded.piece_to_id(end_of_text)
    if end_of_text is not None and not loaded.is_control(end):
        known = ", ".join(repr(loaded.id_to_piece(i)) for i in range(loaded.vocab_size()) if loaded.is_control(i))
        raise UserError(
            f"tokenizer.end_of_text: {end_of_text!r} is not a special token of {named}. Its special tokens: {known}."
        )
    stored = base64.b64encode(content).decode()
    return SentencePieceTokenizer({"name": "file", "sentencepiece": stored, "end_of_text": end if end >= 0 else None})


def _load_sentencepiece(content: bytes) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise UserError(
            "The tokenizer is a SentencePiece model, which requires the sentencepiece package. Install with: "
            f"{install_extra('sentencepiece')}"
        ) from None
    return SentencePieceProcessor(model_proto=content)
