"""Tokenizer files of other programs: the same token IDs as with the tokenizers library, or refused by their part."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from gptlab.data.tokenizers.external import as_byte_level_bpe, tokenizer_record
from gptlab.data.tokenizers.gpt2_vocabulary import bytes_to_unicode
from gptlab.data.tokenizers.tokenizer import GPT2Tokenizer, load_tokenizer
from gptlab.errors import UserError

TEXTS = [
    "the cat sat on the mat, the cat's hat",
    "Naïve café 世界 👍\r\n\tthe  cat   ",
    " the",
    "THE Cat ﬁne <|endoftext|>",
]
END = "<|endoftext|>"
LETTERS = sorted(set("".join(TEXTS)))


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=[], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 9, trainer)
    tokenizer.add_special_tokens([END])
    return tokenizer


def characters() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(LETTERS)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return tokenizer


def changed(tokenizer: Tokenizer, **parts: object) -> dict:
    """Returns the tokenizer as JSON with other parts: objects of the library, or options of the model."""
    for name, part in parts.items():
        if not name.startswith("model_"):
            setattr(tokenizer, name, part)
    described = json.loads(tokenizer.to_str())
    described["model"] |= {name.removeprefix("model_"): v for name, v in parts.items() if name.startswith("model_")}
    return described


def without(described: dict, tokens: int) -> dict:
    for token in list(described["model"]["vocab"])[:tokens]:
        del described["model"]["vocab"][token]
    return described


def template(single: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, special_tokens=[(END, 290)])


def add_tokens(*tokens: str) -> dict:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(list(tokens))
    return json.loads(tokenizer.to_str())


SPLIT = pre_tokenizers.Split(Regex(r"\\d"), "isolated")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
READ: dict[str, Callable[[], dict]] = {
    "byte-level": lambda: changed(byte_level()),
    "byte-level, post-processor that trims": lambda: changed(byte_level(), post_processor=processors.ByteLevel()),
    "byte-level, post-processor that adds nothing": lambda: changed(byte_level(), post_processor=template("$A")),
    "byte-level, pre-tokenizer in a sequence": lambda: changed(
        byte_level(), pre_tokenizer=pre_tokenizers.Sequence([BYTES])
    ),
    "byte-level, no normalizers": lambda: changed(byte_level(), normalizer=normalizers.Sequence([])),
    "byte-level, merges as text": lambda: changed(
        byte_level(), model_merges=[" ".join(pair) for pair in changed(byte_level())["model"]["merges"]]
    ),
    "characters": lambda: changed(characters()),
}
# Tokenizers that are not built in: the library encodes with the file itself.
OTHERS: dict[str, Callable[[], dict]] = {
    "normalizer": lambda: changed(byte_level(), normalizer=normalizers.NFKC()),
    "lower case": lambda: changed(characters(), normalizer=normalizers.Lowercase()),
    "ignore_merges": lambda: changed(byte_level(), model_ignore_merges=True),
    "byte_fallback": lambda: changed(byte_level(), model_byte_fallback=True),
    "suffix": lambda: changed(byte_level(), model_end_of_word_suffix="</w>"),
    "template": lambda: changed(byte_level(), post_processor=template(f"{END} $A")),
    "template in a sequence": lambda: changed(
        byte_level(), post_processor=processors.Sequence([processors.ByteLevel(), template(f"$A {END}")])
    ),
    "BERT": lambda: changed(byte_level(), post_processor=processors.BertProcessing((END, 290), (END, 290))),
    "prefix space": lambda: changed(byte_level(), pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "no regex": lambda: changed(
        byte_level(), pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ),
    "two pre-tokenizers": lambda: changed(byte_level(), pre_tokenizer=pre_tokenizers.Sequence([SPLIT, BYTES])),
    "Whitespace": lambda: changed(byte_level(), pre_tokenizer=pre_tokenizers.Whitespace()),
    "no pre-tokenizer": lambda: changed(byte_level()) | {"pre_tokenizer": None},
    "special tokens": lambda: add_tokens("<pad>", "<mask>"),
    "no byte": lambda: without(changed(byte_level()) | {"added_tokens": []}, 3),
    "gap": lambda: changed(characters(), model_vocab={letter: 2 * n for n, letter in enumerate(LETTERS)}),
    "words": lambda: changed(characters(), model_vocab={"the": 0, "cat": 1}),
    "characters by space": lambda: changed(characters(), pre_tokenizer=pre_tokenizers.Whitespace()),
}
REFUSED: dict[str, tuple[Callable[[], dict], str]] = {
    "dropout": (lambda: changed(byte_level(), model_dropout=0.1), "model.dropout=0.1"),
    "prefix": (lambda: changed(byte_level(), model_continuing_subword_prefix="##"), "cannot be read by the tokenizers"),
    "Unigram": (lambda: changed(byte_level(), model_type="Unigram"), "cannot be read by the tokenizers library"),
}


def write(folder: Path, described: dict) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize("case", READ)
def test_token_ids_are_those_of_the_library(tmp_path, case):
    record = tokenizer_record(write(tmp_path, READ[case]()), 291)
    theirs, ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), load_tokenizer(record, None)
    for text in TEXTS if case == "characters" else [text.replace(END, "") for text in TEXTS]:
        assert ours.encode(text).tolist() == theirs.encode(text).ids


@pytest.mark.parametrize("case", OTHERS)
def test_other_tokenizers_are_used_as_they_are(tmp_path, case):
    record = tokenizer_record(write(tmp_path, OTHERS[case]()), 291)
    theirs, ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), load_tokenizer(record, None)
    theirs.encode_special_tokens = True
    assert record["name"] == "file"
    for text in TEXTS:
        try:
            expected = theirs.encode(text, add_special_tokens=False).ids
        except Exception:  # a word that has no token
            with pytest.raises(UserError, match="cannot be encoded"):
                ours.encode(text)
        else:
            assert ours.encode(text).tolist() == expected


@pytest.mark.parametrize("case", REFUSED)
def test_other_parts_are_refused_by_name(tmp_path, case):
    build, part = REFUSED[case]
    with pytest.raises(UserError) as error:
        tokenizer_record(write(tmp_path, build()), 291)
    assert str(tmp_path) in str(error.value)
    assert part in str(error.value)


def test_merges_that_are_not_those_of_gpt2_are_refused(tmp_path):
    bpe = as_byte_level_bpe(GPT2Tokenizer(None))
    (tmp_path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(bpe.tokens)}))
    lines = [" ".join(pair) for pair in bpe.merges]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
    assert tokenizer_record(tmp_path, 50257) == {"name": "gpt2"}
    for damaged in (lines[:-1], [lines[1], lines[0], *lines[2:]]):
        (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *damaged, ""]))
        with pytest.raises(UserError, match=r"has the tokens of GPT-2, but its [\d,]+ merges are not GPT-2's 50,000"):
            tokenizer_record(tmp_path, 50257)
    for damaged in ("#version: 0.2\nonly", "#version: 0.2\nno such", "\xff\xfe"):
        (tmp_path / "merges.txt").write_bytes(damaged.encode("latin-1"))
        with pytest.raises(UserError, match=r"is damaged|merges are not GPT-2's"):
            tokenizer_record(tmp_path, 50257)


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        ("", r"2 of its tokens, such as 'ab', are not made by a merge"),
        ("#version: 0.2\na b\n", r"1 of its tokens, such as 'abc', are not made by a merge"),
        ("#version: 0.2\na b\nab\n", r"vocab\.json or merges\.txt of \S+ is damaged"),
        ("#version: 0.2\na b\nab q c\n", r"vocab\.json or merges\.txt of \S+ is damaged"),
    ],
)
def test_damaged_merges_are_refused(tmp_path, merges, message):
    tokens = [*map(bytes_to_unicode, (bytes((byte,)) for byte in range(256))), "ab", "abc", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nab c\n")
    assert tokenizer_record(tmp_path, 259)["name"] == "bpe"
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(UserError, match=message):
        tokenizer_record(tmp_path, 259)
