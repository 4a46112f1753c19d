"""nanoGPT's character data, with the meta.pkl that says what its ids mean."""

import pickle

import numpy as np
import pytest

from canary import Canary
from gptlab.data.shards.open_shards import open_shards
from gptlab.data.tokenizers.external import read_meta
from gptlab.data.tokenizers.tokenizer import BytesTokenizer
from gptlab.errors import UserError
from preparing import data_config, tokenizer_config

TEXT = "To be, or not to be: that is the question.\né" * 20


def nanogpt_data(folder, text: str = TEXT):
    """Write what nanoGPT's data/shakespeare_char/prepare.py does, as it does it."""
    folder.mkdir(exist_ok=True)
    chars = sorted(set(text))
    stoi = {ch: i for i, ch in enumerate(chars)}
    itos = dict(enumerate(chars))
    cut = int(len(text) * 0.9)
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        np.array([stoi[c] for c in part], dtype=np.uint16).tofile(folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(chars), "itos": itos, "stoi": stoi}))
    return folder


def opened(folder, cache, name: str = "characters"):
    config = data_config(corpus="shards", path=str(folder), cache_dir=str(cache))
    return open_shards(config, tokenizer_config(name))


def test_character_data_of_nanogpt_is_the_text_it_was_made_of(tmp_path):
    prepared = opened(nanogpt_data(tmp_path / "char"), tmp_path / "cache")
    stream = prepared.stream("train")
    assert prepared.tokenizer.decode(stream.read([0], len(stream))[0].tolist()) == TEXT[: int(len(TEXT) * 0.9)]
    assert prepared.manifest.vocab_size == len(set(TEXT))
    assert prepared.manifest.bytes("train") == len(TEXT[: int(len(TEXT) * 0.9)].encode())
    assert prepared.manifest.tokenizer == {"name": "characters", "characters": "".join(sorted(set(TEXT)))}


def test_another_table_beside_the_same_tokens_is_read_anew(tmp_path):
    folder = nanogpt_data(tmp_path / "char")
    opened(folder, tmp_path / "cache")
    itos = dict(enumerate("abcdefghijklmnopqrstuvwxyz"))
    (folder / "meta.pkl").write_bytes(pickle.dumps({"itos": itos}))
    assert opened(folder, tmp_path / "cache").tokenizer.decode([0, 25]) == "az"


def test_ids_in_any_order_and_every_protocol(tmp_path):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": {1: "b", 0: "\U0001f600"}}, protocol))
        assert read_meta(tmp_path / "meta.pkl").characters == "\U0001f600b"


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_characters_are_not_taken_for_other_tokens(tmp_path, name):
    with pytest.raises(UserError, match=rf"meta\.pkl says that .* not those of tokenizer={name}; tokenizer=characters"):
        opened(nanogpt_data(tmp_path / "char"), tmp_path / "cache", name)


def test_without_a_table_nobody_knows_the_characters(tmp_path):
    (nanogpt_data(tmp_path / "char") / "meta.pkl").unlink()
    with pytest.raises(UserError, match=r"train\.bin does not say which tokens tokenizer=characters means"):
        opened(tmp_path / "char", tmp_path / "cache")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"vocab_size": 3}, "it has no table itos"),
        ([1, 2], "it has no table itos"),
        ({"itos": {0: "a", 1: "bc"}}, "it has no table itos"),
        ({"itos": {0: "a", 1: 7}}, "it has no table itos"),
        ({"itos": {0: "a", 1: "\ud800"}}, "it has no table itos"),
        ({"itos": {0: "a", 2: "b"}}, "does not give each id from 0 to 1 a character of its own"),
        ({"itos": {0: "a", 1: "a"}}, "does not give each id from 0 to 1 a character of its own"),
        ({"itos": {0: BytesTokenizer()}}, r"it names .*BytesTokenizer.* could run any code"),
    ],
)
def test_what_a_table_lacks_is_said(tmp_path, content, sentence):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=sentence) as error:
        read_meta(tmp_path / "meta.pkl")
    assert str(tmp_path / "meta.pkl") in str(error.value)


@pytest.mark.parametrize("cut", [0, 1, 20])
def test_a_damaged_table_is_refused(tmp_path, cut):
    path = nanogpt_data(tmp_path) / "meta.pkl"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"meta\.pkl is refused"):
        read_meta(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_payload_is_refused_and_not_run(tmp_path, protocol):
    canary = Canary(tmp_path / "canary")
    folder = nanogpt_data(tmp_path / "char")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"itos": {0: "a"}, "x": canary}, protocol))
    with pytest.raises(UserError, match=r"meta\.pkl is refused: it names \w+\.mkdir, which"):
        opened(folder, tmp_path / "cache")
    assert not canary.was_run()


def test_the_opcodes_that_call_without_a_name_on_the_stack_are_refused_as_well(tmp_path):
    canary = tmp_path / "canary"
    for payload in (
        b"(S'" + str(canary).encode() + b"'\nios\nmkdir\n.",  # INST
        b"(cos\nmkdir\nS'" + str(canary).encode() + b"'\no.",  # OBJ
    ):
        pickle.loads(payload)  # noqa: S301  (the proof)
        canary.rmdir()
        (tmp_path / "meta.pkl").write_bytes(payload)
        with pytest.raises(UserError, match=r"it names os\.mkdir"):
            read_meta(tmp_path / "meta.pkl")
        assert not canary.exists()
