"""Reading of W&B's records, compared with W&B's own reader."""

import json
import subprocess
import sys
from pathlib import Path
from zlib import crc32

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from gptlab.tracking.wandb.files import last_step, mark_synced, sync_command, truncate_incomplete, wandb_records

WANDB = Path(sys.executable).parent / "wandb"


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Run directory with a record whose rows are from one byte to several blocks long."""
    directory = tmp_path_factory.mktemp("run")
    settings = wandb.Settings(silent=True, x_disable_stats=True, console="off")
    run = wandb.init(project="p", id="abc", dir=directory, mode="offline", settings=settings)
    for step in range(2, 40):
        run.log({"text": "x" * (step * 1777 if step % 7 else 100_000)}, step=step)
    run.finish()
    wandb.teardown()  # waits until the record is complete
    return directory


def steps(record: Path) -> list[int]:
    """Returns the steps that W&B's reader finds."""
    printed = subprocess.run((WANDB, "leet", "inspect", "--json", record), capture_output=True, check=True).stdout
    return [record["history"]["step"]["num"] for record in map(json.loads, printed.splitlines()) if "history" in record]


def test_last_step_agrees_with_wandbs_reader(directory):
    (record,) = wandb_records(directory)
    assert steps(record)[-1] == 39
    assert last_step(record) == 39


@pytest.mark.parametrize("kept", [0, 100, 32768, 1_000_003])
def test_last_step_of_a_truncated_record_agrees_with_wandbs_reader(directory, tmp_path, kept):
    (whole,) = wandb_records(directory)
    assert whole.stat().st_size > 1_000_003
    record = tmp_path / "run-abc.wandb"
    record.write_bytes(whole.read_bytes()[:kept])
    found = steps(record) if kept > 7 else []
    assert last_step(record) == max(found, default=-1)


@pytest.mark.parametrize("kept", [100, 32768, 1_000_003])
def test_truncate_incomplete_keeps_every_complete_row(directory, tmp_path, kept):
    (whole,) = wandb_records(directory)
    record = tmp_path / "run-abc.wandb"
    record.write_bytes(whole.read_bytes()[:kept])
    found = steps(record)
    truncate_incomplete(record)
    assert steps(record) == found
    size = record.stat().st_size
    assert size < kept
    read = subprocess.run((WANDB, "leet", "inspect", "--json", record), capture_output=True, text=True, check=True)
    assert "unexpected EOF" not in read.stderr
    truncate_incomplete(record)
    assert record.stat().st_size == size  # a complete record stays unchanged


def test_truncate_incomplete_leaves_a_complete_record_unchanged(directory):
    (whole,) = wandb_records(directory)
    before = whole.read_bytes()
    truncate_incomplete(whole)
    assert whole.read_bytes() == before


def row(step: int, length: int) -> bytes:
    """Returns the row of a step as a message of ``length`` bytes."""
    message = Record()
    message.history.step.num = step
    item = message.history.item.add(key="text", value_json='""')
    for _ in range(3):  # the length is written before the text, in up to three bytes
        item.value_json = f'"{"x" * (len(item.value_json) - 2 + length - message.ByteSize())}"'
    assert message.ByteSize() == length
    return message.SerializeToString()


@pytest.mark.parametrize("left", [0, 1, 6, 7, 8])
def test_padding_at_the_end_of_a_block_is_skipped(tmp_path, left):
    """Two rows in LevelDB's format: the first one leaves ``left`` bytes of its block."""
    record, one, two = tmp_path / "run-abc.wandb", row(1, 32768 - 7 - 7 - left), row(2, 100)
    content = b":W&B\xe1\xbe\x00" + fragment(1, one)
    if left < 7:
        content += bytes(left) + fragment(1, two)
    else:
        content += fragment(2, two[: left - 7]) + fragment(4, two[left - 7 :])
    record.write_bytes(content)
    assert steps(record) == [1, 2]
    assert last_step(record) == 2


def test_last_step_stops_at_a_damaged_row(tmp_path):
    record, damaged = tmp_path / "run-abc.wandb", bytearray(fragment(1, row(2, 100)))
    damaged[50] ^= 255
    record.write_bytes(b":W&B\xe1\xbe\x00" + fragment(1, row(1, 100)) + damaged)
    assert last_step(record) == 1
    assert steps(record) == [1]


def fragment(kind: int, data: bytes) -> bytes:
    return crc32(bytes([kind]) + data).to_bytes(4, "little") + len(data).to_bytes(2, "little") + bytes([kind]) + data


def test_sync_command_names_unsent_records_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("run-20260102_000000-a", "offline-run-20260101_000000-a", "offline-run-20260103_000000-a")
    for name in names:
        folder = Path("run/wandb") / name
        folder.mkdir(parents=True)
        (folder / "run-a.wandb").touch()
    (Path("run/wandb") / "latest-run").symlink_to(names[0])
    in_order = [f"run/wandb/{names[i]}" for i in (1, 0, 2)]
    assert [str(record.parent) for record in wandb_records(Path("run"))] == in_order
    mark_synced(wandb_records(Path("run"))[1])
    assert sync_command(Path("run")) == f"wandb sync --include-online {in_order[0]} {in_order[2]}"
    Path("run").rename("it's; touch x")
    quoted = (f"'it'\"'\"'s; touch x/wandb/{names[i]}'" for i in (1, 2))
    assert sync_command(Path("it's; touch x")) == f"wandb sync --include-online {' '.join(quoted)}"
