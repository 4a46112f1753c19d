"""Tokenizers of one's own: the tokenizer protocol, checks on the corpus, and stored records that run no code."""

import json
from pathlib import Path

import pytest

from gptlab.config.trust import trust_packages
from gptlab.data.config import ComponentTokenizerConfig
from gptlab.data.prepare.prepare import prepare
from gptlab.data.prepare.tasks import PrepareOptions
from gptlab.data.shards.open_shards import open_shards
from gptlab.data.tokenizers.text_stream import TextStream
from gptlab.data.tokenizers.tokenizer import BytesTokenizer, Tokenizer, build_tokenizer, load_tokenizer
from gptlab.errors import UserError
from own_parts import forget, write_package, write_pages
from preparing import ALONE, data_config, prepare_text, tokens_on_disk

TEXT = "naïve 👍 text\n"


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("GPTLAB_TRUST", "")
    forget()
    yield write_package(tmp_path)
    forget()


def config(name: str, **arguments) -> ComponentTokenizerConfig:
    return ComponentTokenizerConfig.model_validate({"_target_": f"mylab.tokenizers.{name}", **arguments})


def build(name: str, **arguments) -> Tokenizer:
    return build_tokenizer(config(name, **arguments), ())


def prepare_pages(name: str, work: PrepareOptions = ALONE, **arguments):
    if not Path("pages.txt").exists():  # prepared data is found by the modification time
        write_pages(Path("pages.txt"))
    data = data_config(source="pages.txt", cache_dir="cache", task_bytes=2000)
    return prepare(data, config(name, **arguments), work)


def test_a_tokenizer_with_the_ids_of_bytes_equals_tokenizer_bytes():
    own, theirs = build("Utf8"), BytesTokenizer()
    ids = [*theirs.encode(TEXT).tolist(), 256, *theirs.encode("é")[:1].tolist()]
    assert own.encode(TEXT).tolist() == theirs.encode(TEXT).tolist()
    assert own.encode(TEXT).dtype == theirs.encode(TEXT).dtype
    assert own.decode(ids) == theirs.decode(ids)
    assert own.to_bytes(ids) == theirs.to_bytes(ids)
    assert own.token_bytes().tolist() == theirs.token_bytes().tolist()
    assert (own.vocab_size, own.end_of_text) == (257, 256)


def test_text_is_streamed_by_complete_characters():
    tokenizer = build("Utf8", shift=3)
    stream = TextStream(tokenizer, [])
    pieces = [stream.push([i]) for i in tokenizer.encode("👍x")]
    assert pieces == ["", "", "", "👍", "x"]


@pytest.mark.parametrize("work", [ALONE, PrepareOptions(workers=2)], ids=["here", "workers"])
def test_shards_have_the_ids_of_the_tokenizer(work):
    own = prepare_pages("Utf8", work, shift=3)
    theirs = prepare_text(Path("pages.txt"), task_bytes=2000)
    for split in ("train", "val"):
        expected = [(i + 3) % 257 for i in tokens_on_disk(theirs.folder, split)]
        assert tokens_on_disk(own.folder, split) == expected
        assert own.manifest.bytes(split) == theirs.manifest.bytes(split)


def test_the_record_has_target_and_arguments_and_rebuilds_the_tokenizer():
    record = prepare_pages("Utf8", shift=3).manifest.tokenizer
    assert record["name"] == "mylab.tokenizers.Utf8"
    assert record["component"] == {"_target_": "mylab.tokenizers.Utf8", "shift": 3}
    trust_packages(["mylab"])
    assert load_tokenizer(json.loads(json.dumps(record)), None).encode("a").tolist() == [ord("a") + 3]


def test_editing_the_tokenizer_prepares_the_data_again(package):
    first = prepare_pages("Utf8")
    source = package / "tokenizers.py"
    source.write_text(source.read_text() + "\n# edited\n")
    forget()
    second = prepare_pages("Utf8")
    assert second.folder != first.folder
    assert second.manifest.fingerprint() == first.manifest.fingerprint()  # so that a run can be resumed


def test_a_changed_vocabulary_is_found_when_a_record_is_loaded():
    trust_packages(["mylab"])
    Path("words").write_text("one two")
    tokenizer = build("Words", words="words")
    assert load_tokenizer(tokenizer.record(), None).decode([1, 0, 2]) == "one two"
    Path("words").write_text("two one")
    with pytest.raises(UserError, match="does not have the vocabulary with which"):
        load_tokenizer(tokenizer.record(), None)


def test_token_files_can_be_read_with_an_own_tokenizer():
    own = prepare_pages("Utf8", shift=3)
    files = Path("files")
    files.mkdir()
    for split in ("train", "val"):
        (files / f"{split}.bin").write_bytes(b"".join(p.read_bytes() for p in sorted(own.folder.glob(f"{split}_*"))))
    data = data_config(corpus="shards", path="files", cache_dir="cache")
    trust_packages(["mylab"])
    read = open_shards(data, config("Utf8", shift=3))
    assert read.manifest.tokenizer == own.manifest.tokenizer
    assert read.manifest.bytes("train") == own.manifest.bytes("train")
    other = open_shards(data, config("Utf8"))
    assert other.manifest.tokenizer != own.manifest.tokenizer


# --- mistakes


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Utf9", {}, r"tokenizer\._target_=mylab\.tokenizers\.Utf9 cannot be imported"),
        ("Sequence", {}, r"not a subclass of .*CustomTokenizer"),
        ("Unfinished", {}, "has no method decode"),
        ("Utf8", {"shfit": 1}, r"Unknown argument tokenizer\.shfit.*shift"),
        ("Utf8", {"shift": "one"}, r"tokenizer\.shift='one' is not valid: it should be an integer"),
        ("Words", {}, r"tokenizer\.words is missing"),
        ("Sizeless", {}, "vocab_size=None should be the number of token IDs"),
    ],
)
def test_a_mistake_in_the_configuration_is_found_before_anything_is_written(name, arguments, message):
    with pytest.raises(UserError, match=message):
        prepare_pages(name, **arguments)
    assert not Path("cache").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Lossy", r"decode\(encode\(text\)\) is not the text: at character \d+, it is '8"),
        ("TooLarge", r"returns token IDs of \d+ to 300"),
        ("Ending", "returns end_of_text=256"),
        ("Split", r"the bytes of the tokens \(id_to_bytes\) are not those of the text: at character \d+"),
    ],
)
def test_an_inconsistent_tokenizer_is_an_error_and_leaves_no_data(name, message):
    with pytest.raises(UserError, match=message):
        prepare_pages(name)
    assert not [path for path in Path("cache").iterdir() if path.is_dir()]


# --- stored records of others


@pytest.fixture
def stranger(tmp_path, monkeypatch) -> Path:
    """Prepared data of another user, whose tokenizer creates a file when it is imported."""
    package = tmp_path / "stranger"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from pathlib import Path\nfrom mylab.tokenizers import Utf8\n\nclass Attack(Utf8):\n"
        "    pass\n\nPath('attacked').touch()\n"
    )
    source = write_pages(Path("pages.txt"))
    attack = ComponentTokenizerConfig.model_validate({"_target_": "stranger.Attack"})
    prepared = prepare(data_config(source=str(source), cache_dir="cache"), attack, ALONE)
    Path("attacked").unlink()  # the payload works
    forget("stranger")
    yield prepared.folder
    forget("stranger")


def stored_record(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())["tokenizer"]


def test_a_record_of_an_untrusted_package_is_refused(stranger):
    with pytest.raises(UserError, match=r"tokenizer\._target_=stranger\.Attack .*not trusted"):
        load_tokenizer(stored_record(stranger), None)
    assert not Path("attacked").exists()
    trust_packages(["stranger"])
    load_tokenizer(stored_record(stranger), None)
    assert Path("attacked").exists()


def test_a_record_that_calls_itself_gpt2_is_refused(stranger):
    with pytest.raises(UserError, match="not trusted"):
        load_tokenizer(stored_record(stranger) | {"name": "gpt2"}, None)
    assert not Path("attacked").exists()


@pytest.mark.parametrize(
    "component",
    [
        {"_target_": "gptlab.data.tokenizers.component.ComponentTokenizer", "component": {"_target_": "os.mkdir"}},
        {"_target_": "gptlab.data.prepare.prepare.prepare"},
        {"_target_": "mylab.tokenizers.Utf8", "shift": {"_target_": "os.getpid"}},
        {"_target_": ["os.getpid"]},
        ["os.getpid"],
    ],
)
def test_a_record_cannot_name_another_callable(component):
    trust_packages(["mylab"])
    with pytest.raises(UserError):
        load_tokenizer({"name": "x", "component": component}, None)


def test_shards_of_another_tokenizer_are_refused(stranger):
    data = data_config(corpus="shards", path=str(stranger), cache_dir="cache")
    with pytest.raises(UserError, match=r"prepared with tokenizer=stranger\.Attack"):
        open_shards(data, config("Utf8"))
    manifest = stranger / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"name": "stranger.Attack"', '"name": "mylab.tokenizers.Utf8"'))
    trust_packages(["mylab"])
    with pytest.raises(UserError, match="other arguments"):
        open_shards(data, config("Utf8"))
    assert not Path("attacked").exists()
