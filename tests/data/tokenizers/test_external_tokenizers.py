"""nanoGPT's character-level data with meta.pkl, which maps token IDs to characters."""

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
    """Writes the files of nanoGPT's data/shakespeare_char/prepare.py."""
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


def test_nanogpt_character_data_decodes_to_its_text(tmp_path):
    prepared = opened(nanogpt_data(tmp_path / "char"), tmp_path / "cache")
    stream = prepared.stream("train")
    assert prepared.tokenizer.decode(stream.read([0], len(stream))[0].tolist()) == TEXT[: int(len(TEXT) * 0.9)]
    assert prepared.manifest.vocab_size == len(set(TEXT))
    assert prepared.manifest.bytes("train") == len(TEXT[: int(len(TEXT) * 0.9)].encode())
    assert prepared.manifest.tokenizer == {"name": "characters", "characters": "".join(sorted(set(TEXT)))}


def test_changed_meta_file_is_read_again(tmp_path):
    folder = nanogpt_data(tmp_path / "char")
    opened(folder, tmp_path / "cache")
    itos = dict(enumerate("abcdefghijklmnopqrstuvwxyz"))
    (folder / "meta.pkl").write_bytes(pickle.dumps({"itos": itos}))
    assert opened(folder, tmp_path / "cache").tokenizer.decode([0, 25]) == "az"


def test_meta_file_is_read_in_any_order_and_pickle_protocol(tmp_path):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": {1: "b", 0: "\U0001f600"}}, protocol))
        assert read_meta(tmp_path / "meta.pkl").characters == "\U0001f600b"


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_characters_with_another_tokenizer_raise(tmp_path, name):
    with pytest.raises(UserError, match=rf"tokenizer={name} does not match .*meta\.pkl.*tokenizer=characters"):
        opened(nanogpt_data(tmp_path / "char"), tmp_path / "cache", name)


def test_characters_without_a_meta_file_raise(tmp_path):
    (nanogpt_data(tmp_path / "char") / "meta.pkl").unlink()
    with pytest.raises(UserError, match=r"train\.bin cannot be read with tokenizer=characters"):
        opened(tmp_path / "char", tmp_path / "cache")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"vocab_size": 3}, "has no table itos"),
        ([1, 2], "has no table itos"),
        ({"itos": {0: "a", 1: "bc"}}, "has no table itos"),
        ({"itos": {0: "a", 1: 7}}, "has no table itos"),
        ({"itos": {0: "a", 1: "\ud800"}}, "has no table itos"),
        ({"itos": {0: "a", 2: "b"}}, "must map each token ID from 0 to 1 to a different character"),
        ({"itos": {0: "a", 1: "a"}}, "must map each token ID from 0 to 1 to a different character"),
        ({"itos": {0: BytesTokenizer()}}, r"refers to .*BytesTokenizer.* could run any code"),
    ],
)
def test_invalid_meta_file_is_reported(tmp_path, content, message):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        read_meta(tmp_path / "meta.pkl")
    assert str(tmp_path / "meta.pkl") in str(error.value)


@pytest.mark.parametrize("cut", [0, 1, 20])
def test_damaged_meta_file_raises(tmp_path, cut):
    path = nanogpt_data(tmp_path) / "meta.pkl"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"meta\.pkl cannot be loaded as plain data"):
        read_meta(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_payload_raises_and_is_not_run(tmp_path, protocol):
    canary = Canary(tmp_path / "canary")
    folder = nanogpt_data(tmp_path / "char")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"itos": {0: "a"}, "x": canary}, protocol))
    with pytest.raises(UserError, match=r"meta\.pkl cannot be loaded as plain data: it refers to \w+\.mkdir"):
        opened(folder, tmp_path / "cache")
    assert not canary.was_run()


def test_inst_and_obj_opcodes_raise(tmp_path):
    canary = tmp_path / "canary"
    for payload in (
        b"(S'" + str(canary).encode() + b"'\nios\nmkdir\n.",  # INST
        b"(cos\nmkdir\nS'" + str(canary).encode() + b"'\no.",  # OBJ
    ):
        pickle.loads(payload)  # noqa: S301  (shows that the payload runs)
        canary.rmdir()
        (tmp_path / "meta.pkl").write_bytes(payload)
        with pytest.raises(UserError, match=r"refers to os\.mkdir"):
            read_meta(tmp_path / "meta.pkl")
        assert not canary.exists()
