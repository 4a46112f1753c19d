"""Tokenizers as transformers keeps them: tokenizer.json, or the older vocab.json with merges.txt.

| tokenizer  | what is written into tokenizer.json                                                                   |
|------------|-------------------------------------------------------------------------------------------------------|
| gpt2, bpe  | a byte-level BPE                                                                                      |
| bytes      | the same without merges: a token for every byte                                                       |
| characters | a table of words, before which the text is cut into characters                                        |

Transformers takes the end of text out of a text as one token, where gptlab reads it as the characters that it is.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gptlab.data.tokenizers.gpt2_vocabulary import bytes_to_unicode, unicode_to_bytes
from gptlab.data.tokenizers.tokenizer import (
    END_OF_TEXT,
    BPETokenizer,
    BytesTokenizer,
    CharactersTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    empty_bpe,
)
from gptlab.errors import UserError

TOKENIZER, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
TOKENIZER_CONFIG = "tokenizer_config.json"
# of GPT-2's 50,257 tokens in the order of their ids, one a line
GPT2_SHA256 = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"


def tokenizer_record(folder: Path, rows: int) -> dict[str, Any] | None:
    """Make of a folder's tokenizer the record of one of gptlab's.

    Args:
        folder: Of a model.
        rows: Of its embedding; without any file, those of GPT-2 mean GPT-2's tokenizer.

    Returns:
        The record; None where there is no file.

    Raises:
        UserError: The tokenizer is none of gptlab's.
    """
    if (folder / TOKENIZER).is_file():
        return _record(folder / TOKENIZER, read_json(folder / TOKENIZER))
    if (folder / VOCABULARY).is_file() and (folder / MERGES).is_file():
        from tokenizers.models import BPE

        vocabulary, merges = BPE.read_file(str(folder / VOCABULARY), str(folder / MERGES))
        return _byte_level(folder / VOCABULARY, vocabulary, [list(pair) for pair in merges])
    return {"name": "gpt2"} if rows in (50257, 50304) else None


class ByteLevelBPE(NamedTuple):
    """A byte-level BPE: its tokens, spelled, in the order of their ids, and the pairs that merge, the first ones first.

    The end of text is the last token.
    """

    tokens: list[str]
    merges: list[tuple[str, str]]


def as_byte_level_bpe(tokenizer: Tokenizer) -> ByteLevelBPE | None:
    """See a tokenizer as a byte-level BPE; None where it is none."""
    if isinstance(tokenizer, BytesTokenizer):
        return ByteLevelBPE([*(bytes_to_unicode(bytes((i,))) for i in range(256)), END_OF_TEXT], [])
    if isinstance(tokenizer, GPT2Tokenizer):
        ranks = tokenizer.merges
        tokens = sorted(ranks, key=lambda token: ranks[token])
        pairs = (_split_merge(token, ranks) for token in tokens if len(token) > 1)
        merges = [(bytes_to_unicode(first), bytes_to_unicode(second)) for first, second in pairs]
        return ByteLevelBPE([*map(bytes_to_unicode, tokens), END_OF_TEXT], merges)
    if isinstance(tokenizer, BPETokenizer):
        model = json.loads(tokenizer.trained)["model"]
        vocabulary = model["vocab"]
        tokens_there = sorted(vocabulary, key=lambda token: vocabulary[token])
        return ByteLevelBPE([*tokens_there, END_OF_TEXT], _parse_merges(model["merges"]))
    return None


def to_huggingface(tokenizer: Tokenizer, block_size: int) -> dict[str, dict[str, Any]]:
    """Write a tokenizer as transformers' AutoTokenizer loads it.

    Args:
        tokenizer: Any but for those of other programs.
        block_size: Of the model that it is for.

    Returns:
        What goes into each JSON file; ``tokenizer_record`` makes the tokenizer's record of it again.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Written

    end = END_OF_TEXT if tokenizer.end_of_text is not None else None
    bpe = as_byte_level_bpe(tokenizer)
    if bpe is not None:
        written = empty_bpe()
        written.model = models.BPE({token: i for i, token in enumerate(bpe.tokens)}, bpe.merges)
        written.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    else:
        assert isinstance(tokenizer, CharactersTokenizer)  # noqa: S101  (there is no other)
        written = Written(models.WordLevel({token: i for i, token in enumerate(tokenizer.characters)}, "<unk>"))
        written.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        written.decoder = decoders.Fuse()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # it takes tokenizer.json as it is
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        **({"bos_token": end, "eos_token": end, "unk_token": end} if end else {}),
    }
    return {TOKENIZER: json.loads(written.to_str()), TOKENIZER_CONFIG: settings}


def _split_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """Find the two tokens that merge into one: those that are left when all merges before it are done."""
    parts = [bytes((byte,)) for byte in token]
    while len(parts) > 2:
        at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _record(path: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    model = described.get("model")
    if not isinstance(model, dict) or not isinstance(vocabulary := model.get("vocab"), dict):
        raise UserError(f"{path} does not describe a tokenizer that gptlab has: it has no model with a vocab.")
    if model.get("type") == "WordLevel" and all(len(token) == 1 for token in vocabulary if token != END_OF_TEXT):
        return {"name": "characters", "characters": "".join(sorted(vocabulary, key=lambda token: vocabulary[token]))}
    cut = described.get("pre_tokenizer") or {}
    ours = (
        model.get("type") in ("BPE", None)
        and described.get("normalizer") is None
        and (cut.get("type"), cut.get("add_prefix_space"), cut.get("use_regex", True)) == ("ByteLevel", False, True)
    )
    added = {token["content"]: token["id"] for token in described.get("added_tokens", [])}
    if not ours or any(token != END_OF_TEXT for token in added):
        raise UserError(
            f"{path} is a tokenizer that gptlab has not: it has byte-level BPE as GPT-2's is, with {END_OF_TEXT} "
            "as the only special token."
        )
    return _byte_level(path, {**vocabulary, **added}, model.get("merges", []))


def _byte_level(path: Path, vocabulary: dict[str, int], merges: list[Any]) -> dict[str, Any]:
    """Make the record of a byte-level BPE, whose last id is the end of text."""
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    if hashlib.sha256("\n".join(tokens).encode()).hexdigest() == GPT2_SHA256:
        return {"name": "gpt2"}
    if sorted(vocabulary.values()) != list(range(len(tokens))) or tokens[-1] != END_OF_TEXT:
        raise UserError(f"{path} has not {END_OF_TEXT} as the last of its ids, or they have gaps.")
    if not merges and [unicode_to_bytes(token) for token in tokens[:-1]] == [bytes((i,)) for i in range(256)]:
        return {"name": "bytes"}
    from tokenizers import models

    del vocabulary[END_OF_TEXT]
    bpe = empty_bpe()
    bpe.model = models.BPE(vocabulary, _parse_merges(merges))
    return {"name": "bpe", "trained": bpe.to_str()}


def _parse_merges(merges: list[Any]) -> list[tuple[str, str]]:
    """Read merges, which older files have as text with a space between the two."""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in merges)
    return [(first, second) for first, second in pairs]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; UserError where there is none."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if not isinstance(described, dict):
        raise UserError(f"{path} is not a JSON object.")
    return described
