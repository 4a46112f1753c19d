"""Tokenizer files of other programs: Hugging Face's tokenizer.json or vocab.json, nanoGPT's meta.pkl.

| tokenizer  | representation in tokenizer.json                             |
|------------|--------------------------------------------------------------|
| gpt2, bpe  | byte-level BPE                                               |
| bytes      | byte-level BPE without merges: one token per byte            |
| characters | WordLevel model after splitting the text into characters     |

transformers encodes <|endoftext|> in a text as one token. gptlab encodes it as ordinary text.
"""

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gptlab.data.tokenizers.file import (
    MERGES,
    TOKENIZER,
    TOKENIZER_CONFIG,
    VOCABULARY,
    JSONTokenizer,
    read_file_tokenizer,
    read_json,
)
from gptlab.data.tokenizers.gpt2_vocabulary import bytes_to_unicode, unicode_to_bytes
from gptlab.data.tokenizers.text import END_OF_TEXT, replace_surrogates
from gptlab.data.tokenizers.tokenizer import (
    BPETokenizer,
    BytesTokenizer,
    CharactersTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    empty_bpe,
)
from gptlab.errors import UserError, first_line
from gptlab.files import MAX_BYTES
from gptlab.parsing import parse_json, unpickle_plain

# SHA-256 of GPT-2's 50,257 tokens in the order of their IDs, one per line
GPT2_SHA256 = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"
# SHA-256 of the 50,000 merges in GPT-2's vocab.bpe, one per line
GPT2_MERGES_SHA256 = "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0"
GPT2_ROWS = (50257, 50304)  # rows of the token embedding: unpadded, and padded by nanoGPT
# gptlab tokenizers that ``to_huggingface`` supports
CONVERTIBLE = (BytesTokenizer, CharactersTokenizer, GPT2Tokenizer, BPETokenizer, JSONTokenizer)
META_FILE = "meta.pkl"  # written by nanoGPT's data/shakespeare_char/prepare.py next to train.bin and val.bin


def tokenizer_record(path: Path, rows: int) -> dict[str, Any] | None:
    """Returns the gptlab record of the tokenizer of an external model.

    Args:
        path: Directory of a Hugging Face model, or a nanoGPT checkpoint, which may have a meta.pkl in its directory.
        rows: Rows of the token embedding. Without tokenizer files, the number of rows of GPT-2 implies its tokenizer.

    Returns:
        The record, or None if the tokenizer is unknown.

    Raises:
        UserError: gptlab does not support the tokenizer, or its file is invalid.
    """
    try:
        return _read_record(path, rows)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises Exception
        raise UserError(f"The tokenizer of {path} is damaged: {first_line(error):.300}.") from error


def _read_record(path: Path, rows: int) -> dict[str, Any] | None:
    if (meta := path.parent / META_FILE).is_file() and path.is_file():
        return read_meta(meta).record()
    if (path / TOKENIZER).is_file():
        return _record(path / TOKENIZER, read_json(path / TOKENIZER))
    if (path / VOCABULARY).is_file() and (path / MERGES).is_file():
        from tokenizers.models import BPE

        _check_bytes(path / VOCABULARY)
        _check_bytes(path / MERGES)
        try:
            vocabulary, merges = BPE.read_file(str(path / VOCABULARY), str(path / MERGES))
        except Exception as error:  # the tokenizers library raises Exception
            files = f"{VOCABULARY} or {MERGES} of {path}"
            raise UserError(
                f"{files} is damaged, and cannot be read as a BPE tokenizer: {first_line(error)}"
            ) from error
        return _byte_level(path / VOCABULARY, vocabulary, [list(pair) for pair in merges])
    return {"name": "gpt2"} if rows in GPT2_ROWS else None


class ByteLevelBPE(NamedTuple):
    """Byte-level BPE: tokens in the order of their IDs, with the end-of-text token last, and merges in order."""

    tokens: list[str]
    merges: list[tuple[str, str]]


def as_byte_level_bpe(tokenizer: Tokenizer) -> ByteLevelBPE | None:
    """Converts a tokenizer to byte-level BPE. Returns None for other tokenizers."""
    if isinstance(tokenizer, BytesTokenizer):
        return ByteLevelBPE([*(bytes_to_unicode(bytes((i,))) for i in range(256)), END_OF_TEXT], [])
    if isinstance(tokenizer, GPT2Tokenizer):
        ranks = tokenizer.merges
        tokens = sorted(ranks, key=lambda token: ranks[token])
        pairs = (_split_merge(token, ranks) for token in tokens if len(token) > 1)
        merges = [(bytes_to_unicode(first), bytes_to_unicode(second)) for first, second in pairs]
        return ByteLevelBPE([*map(bytes_to_unicode, tokens), END_OF_TEXT], merges)
    if isinstance(tokenizer, BPETokenizer):
        model = parse_json(tokenizer.trained)["model"]
        vocabulary = model["vocab"]
        trained_tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
        return ByteLevelBPE([*trained_tokens, END_OF_TEXT], _parse_merges(model["merges"]))
    return None


def to_huggingface(tokenizer: Tokenizer, block_size: int) -> dict[str, dict[str, Any]]:
    """Converts a tokenizer to the files that transformers' AutoTokenizer loads. Inverse of ``tokenizer_record``.

    Args:
        tokenizer: The gptlab tokenizer, one of ``CONVERTIBLE``.
        block_size: Block size of the model.

    Returns:
        Content of each JSON file, by file name.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Written

    end = END_OF_TEXT if tokenizer.end_of_text is not None else None
    bpe = as_byte_level_bpe(tokenizer)
    if isinstance(tokenizer, JSONTokenizer):
        return _written_as_is(tokenizer, block_size)
    if bpe is not None:
        written = empty_bpe()
        written.model = models.BPE({token: i for i, token in enumerate(bpe.tokens)}, bpe.merges)
        written.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    else:
        assert isinstance(tokenizer, CharactersTokenizer)  # noqa: S101  (the other one of CONVERTIBLE)
        written = Written(models.WordLevel({token: i for i, token in enumerate(tokenizer.characters)}, "<unk>"))
        written.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        written.decoder = decoders.Fuse()
    named = {"bos_token": end, "eos_token": end, "unk_token": end} if end else {}
    return {TOKENIZER: json.loads(written.to_str()), TOKENIZER_CONFIG: _settings(block_size) | named}


def _written_as_is(tokenizer: JSONTokenizer, block_size: int) -> dict[str, dict[str, Any]]:
    """Returns the files of the tokenizer of a tokenizer.json, which is written with the content that was read."""
    end = tokenizer.end_token
    named = {"eos_token": end} if end is not None else {}
    return {TOKENIZER: tokenizer.described, TOKENIZER_CONFIG: _settings(block_size) | named}


def _settings(block_size: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # loads tokenizer.json unchanged
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }


def _split_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """Returns the two tokens that are merged into ``token``: those that remain after all merges of lower rank."""
    parts = [bytes((byte,)) for byte in token]
    while len(parts) > 2:
        at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _record(path: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record of a tokenizer.json: of a built-in tokenizer with the same token IDs, if there is one."""
    model = described.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vocabulary, dict):
        return read_file_tokenizer(path.parent, None).record()
    added = {token["content"]: token["id"] for token in described.get("added_tokens", [])}
    is_plain = described.get("normalizer") in (None, {"type": "Sequence", "normalizers": []})
    is_plain = is_plain and _adding_part(described.get("post_processor")) is None
    if model.get("type") == "WordLevel":
        if is_plain and not any(_unsupported_of_characters(described, vocabulary, added)):
            characters = sorted(vocabulary, key=lambda token: vocabulary[token])
            return {"name": "characters", "characters": "".join(characters)}
    elif is_plain and not any(_unsupported_of_bpe(described, model, added)):
        return _byte_level(path, {**vocabulary, **added}, model.get("merges", []))
    return read_file_tokenizer(path.parent, None).record()


def _unsupported_of_bpe(
    described: Mapping[str, Any], model: Mapping[str, Any], added: Mapping[str, int]
) -> Iterator[str]:
    """Yields the parts of a BPE tokenizer that differ from GPT-2's."""
    if model.get("type") not in ("BPE", None):
        yield f"model.type={model['type']}"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(key):
            yield f"model.{key}={json.dumps(model[key])}"
    pre_tokenizer = described.get("pre_tokenizer") or {}
    if pre_tokenizer.get("type") == "Sequence" and len(parts := pre_tokenizer.get("pretokenizers", [])) == 1:
        (pre_tokenizer,) = parts
    if pre_tokenizer.get("type") != "ByteLevel":
        yield f"pre_tokenizer={_type(pre_tokenizer)}"
    elif pre_tokenizer.get("add_prefix_space"):
        yield "pre_tokenizer.add_prefix_space=true"
    elif pre_tokenizer.get("use_regex", True) is not True:
        yield "pre_tokenizer.use_regex=false"
    if others := [token for token in added if token != END_OF_TEXT]:
        yield f"special tokens {', '.join(map(repr, others[:3]))}{', ...' if len(others) > 3 else ''}"
    vocabulary = model["vocab"]
    if missing := sum(bytes_to_unicode(bytes((byte,))) not in vocabulary for byte in range(256)):
        yield f"{missing} of the 256 bytes have no token"


def _unsupported_of_characters(
    described: Mapping[str, Any], vocabulary: Mapping[str, int], added: Mapping[str, int]
) -> Iterator[str]:
    """Yields the parts of a WordLevel tokenizer that are not those of ``to_huggingface``."""
    if not all(map(_is_character, vocabulary)) or added:
        yield "model.type=WordLevel with tokens of several characters"
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        yield "token IDs that are not contiguous"
    pre_tokenizer = described.get("pre_tokenizer") or {}
    split = [pre_tokenizer.get(key) for key in ("type", "pattern", "behavior", "invert")]
    if split != ["Split", {"Regex": r"[\s\S]"}, "Isolated", False]:
        yield f"pre_tokenizer={_type(pre_tokenizer)}"


def _adding_part(post_processor: Mapping[str, Any] | None) -> str | None:
    """Returns the type of a post-processor that adds tokens to a text; None if it adds none."""
    if post_processor is None or post_processor["type"] == "ByteLevel":
        return None
    if post_processor["type"] == "Sequence":
        parts = map(_adding_part, post_processor["processors"])
        return next((part for part in parts if part is not None), None)
    if post_processor["type"] == "TemplateProcessing" and not any(
        "SpecialToken" in p for p in post_processor["single"]
    ):
        return None
    return _type(post_processor)


def _type(part: Mapping[str, Any]) -> str:
    return str(part.get("type", "none"))


def _byte_level(path: Path, vocabulary: dict[str, int], merges: list[Any]) -> dict[str, Any]:
    """Returns the record of a byte-level BPE whose last ID is the end-of-text token."""
    tokens, pairs = sorted(vocabulary, key=lambda token: vocabulary[token]), _parse_merges(merges)
    if hashlib.sha256("\n".join(tokens).encode()).hexdigest() == GPT2_SHA256:
        if hashlib.sha256("\n".join(map(" ".join, pairs)).encode()).hexdigest() != GPT2_MERGES_SHA256:
            raise UserError(f"{path} has the tokens of GPT-2, but its {len(pairs):,} merges are not GPT-2's 50,000.")
        return {"name": "gpt2"}
    if sorted(vocabulary.values()) != list(range(len(tokens))) or tokens[-1] != END_OF_TEXT:
        return read_file_tokenizer(path.parent, None).record()
    made = {first + second for first, second in pairs}
    if unmade := [token for token in tokens[:-1] if len(token) > 1 and token not in made]:
        raise UserError(
            f"{path} is damaged: {len(unmade):,} of its tokens, such as {unmade[0]!r:.80}, are not made by a merge."
        )
    if not merges and [unicode_to_bytes(token) for token in tokens[:-1]] == [bytes((i,)) for i in range(256)]:
        return {"name": "bytes"}
    from tokenizers import models

    del vocabulary[END_OF_TEXT]
    bpe = empty_bpe()
    bpe.model = models.BPE(vocabulary, pairs)
    return {"name": "bpe", "trained": bpe.to_str()}


def _parse_merges(merges: list[Any]) -> list[tuple[str, str]]:
    """Parses merges. Older files have each pair as one string with a space. Raises ValueError for anything else."""
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
    if wrong := next((pair for pair in pairs if len(pair) != 2), None):
        raise ValueError(f"the merge {' '.join(map(str, wrong))!r:.80} does not have two tokens")
    return pairs


def read_meta(path: Path) -> CharactersTokenizer:
    """Builds the tokenizer of nanoGPT's meta.pkl, without running code from the pickle.

    Raises:
        UserError: The file is not a pickle of plain data that maps each token ID to a different character.
    """
    meta = _load_plain(path)
    itos = meta.get("itos") if isinstance(meta, dict) else None
    if not isinstance(itos, dict) or not all(_is_character(text) for text in itos.values()):
        raise UserError(f"{path} has no table itos that maps token IDs to characters.")
    if set(itos) != set(range(len(itos))) or len(set(itos.values())) < len(itos):
        raise UserError(f"{path} must map each token ID from 0 to {len(itos) - 1} to a different character.")
    return CharactersTokenizer("".join(itos[number] for number in range(len(itos))))


def meta_file(tokenizer: CharactersTokenizer) -> bytes:
    """Returns nanoGPT's meta.pkl of a tokenizer, which ``read_meta`` reads."""
    itos = dict(enumerate(tokenizer.characters))
    stoi = {character: number for number, character in itos.items()}
    return pickle.dumps({"vocab_size": len(itos), "itos": itos, "stoi": stoi})


def _is_character(text: Any) -> bool:
    return isinstance(text, str) and len(text) == 1 and replace_surrogates(text) == text


def _check_bytes(path: Path) -> None:
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"{path} has {size:,} bytes, which is too large for the vocabulary of a tokenizer.")


def _load_plain(path: Path) -> Any:
    """Unpickles plain data. Raises UserError for anything else."""
    _check_bytes(path)
    try:
        return unpickle_plain(path.read_bytes())
    except Exception as error:  # a damaged pickle can raise any exception
        raise UserError(f"{path} cannot be loaded as plain data: {error}.") from error
