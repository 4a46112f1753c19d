"""Custom tokenizers: components that users write."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gptlab.config.components import TARGET, build_component, check_component
from gptlab.data.tokenizers.text import END_OF_TEXT, decode_parts, replace_surrogates
from gptlab.errors import UserError


class CustomTokenizer(ABC):
    """Base class of custom tokenizers, which must not lose text: ``decode(encode(text)) == text``.

    Attributes:
        vocab_size: Number of token IDs V, including the end-of-text token.
        end_of_text: ID of the end-of-text token, which gptlab puts between documents. ``encode`` must not return it,
            and it is not passed to the other methods. None: no such token.
    """

    vocab_size: int
    end_of_text: int | None = None

    @abstractmethod
    def encode(self, text: str) -> ArrayLike:
        """Returns the token IDs (N,) of a text, all less than V.

        Raises:
            UserError: The text cannot be encoded.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token IDs, which may be any sequence of IDs less than V."""

    def id_to_bytes(self, token_id: int) -> bytes:
        """Returns the UTF-8 bytes of one token. To be overridden if a token can be a part of a character."""
        return self.decode([token_id]).encode()


def check_tokenizer(component: Mapping[str, Any]) -> None:
    """Checks the target and the arguments of a tokenizer.

    Raises:
        UserError: The target is not a ``CustomTokenizer``, or an argument is not valid.
    """
    target = check_component("tokenizer", component, CustomTokenizer)
    if missing := sorted(getattr(target, "__abstractmethods__", ())):
        raise UserError(f"tokenizer.{TARGET}={component[TARGET]} has no method {' and '.join(missing)}.")


class ComponentTokenizer:
    """Tokenizer that is a component, with the interface of ``gptlab.data.tokenizers.tokenizer.Tokenizer``.

    Args:
        component: The component, whose package is trusted.

    Raises:
        UserError: The component is not a ``CustomTokenizer``, or its vocabulary is not valid.
    """

    def __init__(self, component: Mapping[str, Any]) -> None:
        check_tokenizer(component)
        self.component = dict(component)
        built: CustomTokenizer = build_component(component)
        self._tokenizer = built
        size, end = getattr(built, "vocab_size", None), built.end_of_text
        if not isinstance(size, int) or size < 1:
            raise self._error(f"vocab_size={size} should be the number of token IDs")
        if end is not None and end not in range(size):
            raise self._error(f"end_of_text={end} should be None or less than vocab_size={size}")
        self.vocab_size, self.end_of_text = size, end
        self._bytes_of = [END_OF_TEXT.encode() if i == end else built.id_to_bytes(i) for i in range(size)]

    def encode(self, text: str) -> NDArray[np.uint32]:  # noqa: D102
        ids = np.asarray(self._tokenizer.encode(replace_surrogates(text)), dtype=np.int64)
        if ids.ndim != 1 or (ids.size and not (ids.min() >= 0 and ids.max() < self.vocab_size)):
            found = f"shape {ids.shape}" if ids.ndim != 1 else f"{ids.min()} to {ids.max()}"
            raise self._error(
                f"encode({text!r:.40}) returns token IDs of {found}, instead of (N,) IDs from 0 to "
                f"vocab_size - 1 = {self.vocab_size - 1}"
            )
        return ids.astype(np.uint32)

    def decode(self, ids: Sequence[int]) -> str:  # noqa: D102
        return decode_parts(ids, self.end_of_text, self._tokenizer.decode)

    def to_bytes(self, ids: Sequence[int]) -> bytes:  # noqa: D102
        return b"".join(self._bytes_of[i] for i in ids)

    def token_bytes(self) -> NDArray[np.int32]:  # noqa: D102
        lengths = [0 if i == self.end_of_text else len(token) for i, token in enumerate(self._bytes_of)]
        return np.array(lengths, dtype=np.int32)

    def record(self) -> dict[str, Any]:
        """Returns the record, with the component and a hash of the vocabulary."""
        vocabulary = json.dumps([self.end_of_text, [token.hex() for token in self._bytes_of]])
        digest = hashlib.sha256(vocabulary.encode()).hexdigest()
        return {"name": self.component[TARGET], "component": self.component, "vocabulary": digest}

    def check(self, texts: Iterable[str]) -> None:
        """Checks the tokenizer on sample texts.

        Raises:
            UserError: A text is not restored, or its bytes are not those of its tokens.
        """
        for text in texts:
            ids = self.encode(text).tolist()
            if self.end_of_text in ids:
                raise self._error(f"encode({text!r:.40}) returns end_of_text={self.end_of_text}")
            if (restored := self.decode(ids)) != text:
                raise self._error(f"decode(encode(text)) is not the text: {_difference(restored, text)}")
            if (joined := self.to_bytes(ids)) != text.encode():
                difference = _difference(joined.decode(errors="replace"), text)
                raise self._error(f"the bytes of the tokens (id_to_bytes) are not those of the text: {difference}")

    def _error(self, problem: str) -> UserError:
        return UserError(f"tokenizer.{TARGET}={self.component[TARGET]}: {problem}.")


def _difference(found: str, text: str) -> str:
    """Describes the first difference between two texts."""
    common = zip(found, text, strict=False)
    at = next((i for i, (a, b) in enumerate(common) if a != b), min(len(found), len(text)))
    return f"at character {at:,}, it is {found[at : at + 20]!r} instead of {text[at : at + 20]!r}"
