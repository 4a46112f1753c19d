"""Tokenizers of files: the same token IDs as transformers, special tokens as text, and refused parts."""

import gzip
import json
import random
import unicodedata
from functools import cache

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from gptlab.data.config import BuiltInTokenizerConfig
from gptlab.data.prepare.prepare import prepare
from gptlab.data.prepare.tasks import PrepareOptions
from gptlab.data.tokenizers.file import read_file_tokenizer
from gptlab.data.tokenizers.text_stream import TextStream
from gptlab.data.tokenizers.tokenizer import load_tokenizer
from gptlab.errors import UserError
from preparing import data_config

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    "def f(x):\n    return x ** 2  # 3.14159",
    "Ça va très bien, naïve façade; Größe, été.",
    "東京は日本の首都です。 世界 مرحبا بالعالم שלום नमस्ते",
] * 8
SPECIAL = [
    "<|endoftext|>",
    "</s>",
    "<s>",
    "<unk>",
    "[CLS]",
    "[SEP]",
    "[UNK]",
    "[MASK]",
    "<pad>",
    "<0x0A>",
    "▁",
    "##ing",
]
UNKNOWN = SPECIAL[3]
SCRIPTS = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F)]
SCRIPTS += [(0x2000, 0x206F), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFE00, 0xFE0F), (0xFF00, 0xFFEF)]
SCRIPTS += [(0x1F300, 0x1FAFF), (0x0, 0x1F), (0x7F, 0x9F), (0xE000, 0xE0FF), (0x10000, 0x10FFF), (0xE0000, 0xE007F)]


def adversarial(number: int = 1000, seed: int = 0) -> list[str]:
    """Returns random texts of all scripts, control and combining characters, long runs, and special tokens."""
    draw = random.Random(seed)  # noqa: S311
    pieces = [
        lambda: "".join(chr(draw.randint(*draw.choice(SCRIPTS))) for _ in range(draw.randint(1, 12))),
        lambda: draw.choice(SPECIAL),
        lambda: draw.choice(SENTENCES)[draw.randint(0, 9) :],
        lambda: draw.choice(" \t\n\r\u3000\u200b\u200d\ufeff\x85\u2028") * draw.randint(1, 40),
        lambda: draw.choice("aé0.世👍-<") * draw.randint(1, 300),
        lambda: draw.choice(["'s", " 'LL", "👩‍👧‍👦", "e\u0301\u0301", "\u202eabc\u202c", "ﬁ", "İ", "K", "1½²", "🇩🇪🇯🇵"]),
        lambda: unicodedata.normalize(draw.choice(["NFD", "NFKC"]), draw.choice(SENTENCES)),
    ]
    return ["", " ", *("".join(draw.choice(pieces)() for _ in range(draw.randint(1, 6))) for _ in range(number - 2))]


def gpt2() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(SENTENCES, trainer)
    made.add_tokens([AddedToken("    ", normalized=False), "façade"])
    return made


def llama3() -> Tokenizer:
    made = gpt2()
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    pattern += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return made


def llama() -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=special, limit_alphabet=60, max_token_length=12, show_progress=False
    )
    made.train_from_iterator(SENTENCES, trainer)
    described = json.loads(made.to_str())
    described["added_tokens"] = described["added_tokens"][:3]
    described["post_processor"] = json.loads(
        processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)]).__getstate__()
    )
    return Tokenizer.from_str(json.dumps(described))


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token=UNKNOWN, show_progress=False
    )
    made.train_from_iterator(SENTENCES, trainer)
    made.enable_truncation(7)
    made.enable_padding()
    return made


def wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token=SPECIAL[6]))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    made.train_from_iterator(SENTENCES, trainer)
    return made


MADE = {"gpt2": gpt2, "llama3": llama3, "llama": llama, "unigram": unigram, "wordpiece": wordpiece}
made = cache(lambda name: MADE[name]())


@pytest.fixture(params=MADE)
def folder(request, tmp_path):
    made(request.param).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_token_ids_are_those_of_transformers(folder):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), split_special_tokens=True)
    ours = read_file_tokenizer(folder, None)
    again = load_tokenizer(json.loads(json.dumps(ours.record())), None)
    assert ours.end_of_text is not None
    spelled = 0
    for text in adversarial():
        ids = ours.encode(text).tolist()
        expected = theirs.encode(text, add_special_tokens=False, truncation=False, padding=False)
        assert not ours.special & set(ids)
        assert again.encode(text).tolist() == ids
        if ours.special & set(expected):  # Unigram makes a special token of its spelling
            spelled += 1
            text = "".join(theirs.convert_ids_to_tokens(expected)).replace("▁", " ")
            assert ours.unknown in ids or ours.to_bytes(ids).decode() == text
        else:
            assert ids == expected
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert (spelled > 0) == (ours.described["model"]["type"] == "Unigram")


@pytest.mark.parametrize("name", ["gpt2", "llama3", "llama"])
def test_bytes_of_the_tokens_are_those_of_the_text(tmp_path, name):
    made(name).save(str(tmp_path / "tokenizer.json"))
    ours = read_file_tokenizer(tmp_path / "tokenizer.json", None)
    prefix = b" " if name == "llama" else b""
    for text in adversarial(300, seed=1):
        if name == "llama" and ("▁" in text or "<0x" in text or not text):
            continue  # this vocabulary has no other spelling of them
        ids = ours.encode(text).tolist()
        assert ours.to_bytes(ids) == prefix + text.encode()
        assert ours.token_bytes()[ids].sum() == len(prefix) + len(text.encode())
        stream = TextStream(ours, [])
        assert "".join([*(stream.push([i]) for i in ids), stream.close()]) == prefix.decode() + text


def test_spelling_of_a_special_token_is_text(folder):
    ours = read_file_tokenizer(folder, None)
    end = ours.end_token
    ids = ours.encode(f"a{end}b").tolist()
    assert ours.end_of_text not in ids
    assert ours.decode([*ids, ours.end_of_text]).endswith("<|endoftext|>")
    assert ours.token_bytes()[ours.end_of_text] == 0


def test_end_of_text_token_is_eos_token_unless_it_is_set(tmp_path):
    made("llama").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<s>"}}))
    assert read_file_tokenizer(tmp_path, None).end_of_text == 1
    assert read_file_tokenizer(tmp_path, "</s>").end_of_text == 2
    with pytest.raises(UserError, match=r"tokenizer.end_of_text: 'the' is not a special token.*'<s>'"):
        read_file_tokenizer(tmp_path, "the")


@pytest.mark.parametrize("name", ["gpt2", "llama3", "llama"])
def test_prepared_text_has_the_token_ids_of_whole_documents(tmp_path, name):
    """A document of several tasks, plain and compressed, has the token IDs of the document."""
    made(name).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "texts").mkdir()
    texts = ["\n\n".join(adversarial(60, seed)).replace("\0", "").removeprefix("\ufeff") for seed in range(4)]
    for number, text in enumerate(texts):
        data = text.encode()
        path = tmp_path / "texts" / f"{number}.txt"
        (path.with_suffix(".txt.gz") if number % 2 else path).write_bytes(gzip.compress(data) if number % 2 else data)
    config = BuiltInTokenizerConfig(
        name="file", path=str(tmp_path / "tokenizer.json"), vocab_dir=None, vocab_size=None, train_mb=None
    )
    data_settings = {
        "source": str(tmp_path / "texts"),
        "cache_dir": str(tmp_path / "cache"),
        "task_bytes": 1000,
        "val_split": "documents",
    }
    prepared = prepare(data_config(**data_settings), config, PrepareOptions(workers=1))
    (tmp_path / "tokenizer.json").unlink()
    ours = load_tokenizer(prepared.manifest.tokenizer, None)
    found = np.concatenate([prepared.stream(s).read([0], len(prepared.stream(s)))[0] for s in ("train", "val")])
    cuts = np.flatnonzero(found == ours.end_of_text)
    documents = sorted(part.tolist() for part in np.split(found, cuts + 1)[:-1])
    assert documents == sorted([*ours.encode(text).tolist(), ours.end_of_text] for text in texts)
    assert prepared.manifest.shards()[0].bytes > 0


def changed(name: str, **parts: object) -> dict:
    described = json.loads(made(name).to_str())
    described["model"] |= {
        key.removeprefix("model_"): parts.pop(key) for key in list(parts) if key.startswith("model_")
    }
    return described | parts


REFUSED = {
    "dropout": (lambda: changed("gpt2", model_dropout=0.1), r"model\.dropout=0\.1"),
    "decoder": (lambda: changed("gpt2", decoder=json.loads(decoders.CTC().__getstate__())), "decoder=CTC"),
    "too large": (lambda: changed("wordpiece", model_vocab={"[UNK]": 0, "a": 2**32}), r"4,294,967,296.*2\^32"),
    "unused IDs": (lambda: changed("wordpiece", model_vocab={"[UNK]": 0, "a": 2**31}), r"2,147,483,648.*unused"),
    "negative ID": (lambda: changed("wordpiece", model_vocab={"[UNK]": 0, "a": -1}), "does not map tokens"),
    "no model": (lambda: {"version": "1.0"}, "has no `model`"),
    "unknown model": (lambda: changed("gpt2", model_type="Markov"), "cannot be read by the tokenizers library"),
    "unknown part": (lambda: changed("gpt2", normalizer={"type": "Rot13"}), "cannot be read by the tokenizers library"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_parts_are_refused_by_name(tmp_path, case):
    build, message = REFUSED[case]
    (tmp_path / "tokenizer.json").write_text(json.dumps(build()))
    with pytest.raises(UserError, match=message):
        read_file_tokenizer(tmp_path / "tokenizer.json", None)


def test_settings_that_transformers_would_change_are_refused(tmp_path):
    made("gpt2").save(str(tmp_path / "tokenizer.json"))
    settings = {"added_tokens_decoder": {"999": {"content": "<tool>"}}, "add_prefix_space": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"adds '<tool>'.*add_prefix_space=true"):
        read_file_tokenizer(tmp_path, None)


def test_missing_and_other_files_are_reported(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        read_file_tokenizer(tmp_path, None)
    with pytest.raises(UserError, match="does not exist"):
        read_file_tokenizer(tmp_path / "missing", None)
    (tmp_path / "tokenizer.json").write_bytes(b"\x80\x04pickle")
    with pytest.raises(UserError, match="cannot be read"):
        read_file_tokenizer(tmp_path, None)


def test_vocabulary_and_merges_of_gpt2_are_read(tmp_path):
    made("gpt2").model.save(str(tmp_path))
    theirs, ours = Tokenizer.from_str(made("gpt2").to_str()), read_file_tokenizer(tmp_path, None)
    assert ours.end_of_text == theirs.token_to_id("<|endoftext|>")
    for text in ("plain text", "naïve 世界 <|endoftext|>"):
        theirs.encode_special_tokens = True
        assert ours.encode(text).tolist() == theirs.encode(text).ids


def test_sentencepiece_model_has_the_token_ids_of_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    for kind in ("bpe", "unigram"):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES),
            model_prefix=str(tmp_path / kind),
            model_type=kind,
            vocab_size=420,
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / f"{kind}.model"))
        ours = read_file_tokenizer(tmp_path / f"{kind}.model", None)
        ours = load_tokenizer(json.loads(json.dumps(ours.record())), None)
        assert ours.end_of_text == theirs.eos_id()
        assert ours.vocab_size == theirs.vocab_size()
        for text in adversarial():
            ids = ours.encode(text).tolist()
            assert ids == theirs.encode(text)
            assert not ours.special & set(ids)
            assert ours.decode(ids) == theirs.decode(ids)
            stream = TextStream(ours, [])
            assert "".join([stream.push(ids), stream.close()]).removeprefix(" ") == theirs.decode(ids)


def test_missing_sentencepiece_is_reported(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    (tmp_path / "spiece.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"\.\[sentencepiece\]"):
        read_file_tokenizer(tmp_path, None)


def test_ids_have_the_dtype_of_all_tokenizers(tmp_path):
    made("gpt2").save(str(tmp_path / "tokenizer.json"))
    assert read_file_tokenizer(tmp_path, None).encode("").dtype == np.uint32
