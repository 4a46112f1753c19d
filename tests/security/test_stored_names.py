"""Records and manifests from somebody else name no file outside of their directory, and no file that never ends."""

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gptlab.data.shards.manifest import Manifest, Shard, load_shards
from gptlab.errors import UserError
from gptlab.files import is_plain_name, open_regular
from gptlab.launch.signals import StoppedEarly, StopSignals, _stop_early
from gptlab.training.checkpoints.records import RECORD, find_corruption, newest_intact

SECRET = b"the user's secret"


@pytest.fixture
def secret(tmp_path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(SECRET)
    return path


def write_checkpoint(folder: Path, **files: bytes) -> Path:
    """Writes a checkpoint with a record of ``files``, to which an attacker may add."""
    checkpoint_dir = folder / "step_000001"
    checkpoint_dir.mkdir(parents=True)
    saved = {}
    for name, content in {"state.pt": b"state", **files}.items():
        (checkpoint_dir / name).write_bytes(content)
        saved[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    facts = {"step": 1, "val_loss": None, "evaluation_due": False}
    (checkpoint_dir / RECORD).write_text(json.dumps({"format": 1, "facts": facts, "files": saved}))
    assert find_corruption(checkpoint_dir) is None
    return checkpoint_dir


def add_to_record(checkpoint_dir: Path, name: str, size: int) -> None:
    record = json.loads((checkpoint_dir / RECORD).read_text())
    record["files"][name] = {"bytes": size, "sha256": "0" * 64}
    (checkpoint_dir / RECORD).write_text(json.dumps(record))


def within(seconds: float, call: Callable[[], object]) -> object:
    """Returns what ``call`` returns; fails if it takes longer, as at a FIFO."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, "it hangs"
    return found[0]


@pytest.mark.parametrize("name", ["/dev/zero", "/etc/passwd", "../../secret", "..", ".", "", "a/state.pt", "a\0"])
def test_a_record_that_names_a_file_elsewhere_is_refused_without_reading_it(tmp_path, secret, name):
    checkpoint_dir = write_checkpoint(tmp_path / "run")
    add_to_record(checkpoint_dir, name, 0 if name == "/dev/zero" else len(SECRET))
    defect = within(10, lambda: find_corruption(checkpoint_dir))
    assert f"names {name!r}, which is not a file in the same directory" in defect
    assert hashlib.sha256(SECRET).hexdigest() not in defect
    assert newest_intact(checkpoint_dir.parent) is None


def test_a_record_without_files_is_refused(tmp_path):
    checkpoint_dir = write_checkpoint(tmp_path)
    record = json.loads((checkpoint_dir / RECORD).read_text())
    (checkpoint_dir / RECORD).write_text(json.dumps(record | {"files": {}}))
    assert "does not name state.pt" in find_corruption(checkpoint_dir)


def test_a_deep_record_is_refused(tmp_path):
    checkpoint_dir = write_checkpoint(tmp_path)
    (checkpoint_dir / RECORD).write_text("[" * 100_000)
    assert f"{RECORD} is not a record" in find_corruption(checkpoint_dir)


@pytest.mark.parametrize("name", ["state.pt", ".metadata", RECORD])
@pytest.mark.parametrize("kind", ["link", "device", "fifo", "directory"])
def test_a_checkpoint_with_anything_but_regular_files_is_refused(tmp_path, secret, name, kind):
    checkpoint_dir = write_checkpoint(tmp_path / "run")
    path = checkpoint_dir / name
    path.unlink(missing_ok=True)
    match kind:
        case "link":
            path.symlink_to(secret)
        case "device":
            path.symlink_to("/dev/zero")
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
    defect = within(10, lambda: find_corruption(checkpoint_dir))
    assert defect in (f"{name}: it is a link", f"{name}: it is not a regular file")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_verification_of_a_huge_file(tmp_path, number):
    checkpoint_dir = write_checkpoint(tmp_path)
    os.truncate(checkpoint_dir / "state.pt", 2**42)  # sparse: takes hours to hash, and no space
    add_to_record(checkpoint_dir, "state.pt", 2**42)
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
    began = time.monotonic()
    with StopSignals(_stop_early), pytest.raises(StoppedEarly):
        find_corruption(checkpoint_dir)
    assert time.monotonic() - began < 5


def write_manifest(folder: Path, name: str, size: int) -> None:
    shard = Shard(file=name, tokens=size // 2, bytes=1, documents=1, sha256="0" * 64)
    Manifest(
        format=1, origin="x", tokenizer={}, vocab_size=9, dtype="uint16", splits={"train": [shard], "val": []}
    ).save(folder)


@pytest.mark.parametrize("name", ["/etc/passwd", "/dev/zero", "../secret", "..", "a/b.bin"])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path, secret, name):
    (tmp_path / "shards").mkdir()
    write_manifest(tmp_path / "shards", name, len(SECRET))
    with pytest.raises(UserError, match="which is not a file in the same directory"):
        load_shards(tmp_path / "shards")


@pytest.mark.parametrize("kind", ["link", "fifo"])
@pytest.mark.parametrize("name", ["train.bin", "manifest.json"])
def test_shards_and_manifests_are_regular_files(tmp_path, secret, name, kind):
    write_manifest(tmp_path, "train.bin", len(SECRET))
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(secret)
    else:
        os.mkfifo(path)

    def load() -> str:
        with pytest.raises(UserError) as error:
            load_shards(tmp_path)
        return str(error.value)

    message = within(10, load)
    assert str(path) in message
    assert "cannot be read" in message


def test_a_described_token_file_elsewhere_may_be_a_link(tmp_path, secret):
    link = tmp_path / "train.bin"
    link.symlink_to(secret)
    (tmp_path / "cache").mkdir()
    write_manifest(tmp_path / "cache", str(link), len(SECRET) - 1)
    with pytest.raises(UserError, match="has 17 bytes"):
        load_shards(tmp_path / "cache", [link])


def test_the_payloads_work_with_plain_calls(tmp_path, secret):
    assert (tmp_path / "run" / "step_000001" / secret).read_bytes() == SECRET  # an absolute name replaces the directory
    (tmp_path / "link").symlink_to(secret)
    assert (tmp_path / "link").read_bytes() == SECRET
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(AssertionError, match="it hangs"):
        within(0.2, (tmp_path / "fifo").read_bytes)
    with (tmp_path / "fifo").open("w"):  # ends the thread
        pass


def test_plain_names_and_regular_files_are_accepted(secret):
    assert all(is_plain_name(name) for name in ("state.pt", ".metadata", "__0_0.distcp", "..a", "ä b"))
    with open_regular(secret) as file:
        assert file.read() == SECRET
