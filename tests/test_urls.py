"""Commands that read shards from a URL, end to end."""

import sys

import pytest

from commands import assert_success, metrics
from serving import served

SMALL = ("model=tiny", "model.block_size=32", "train.log_every=1", "train.eval_every=20", "train.eval_windows=10")
BLOCKS = ("data=shards", "data.order=block", "data.block_shards=2")


@pytest.fixture
def server(user):
    """Server of the text in 16 shards of the train split, of 8 kB each."""
    assert_success(user.python("gptlab.prepare", "data=text", "data.source=text.txt", "data.task_bytes=4000"))
    (folder,) = (path for path in (user.folder / "cache").glob("*-*") if path.is_dir())
    with served(folder) as server:
        yield server


@pytest.mark.slow
def test_training_and_inspection_of_a_url_are_those_of_its_directory(user, server):
    steps = "train.max_steps=60"  # of 12 windows each: these read six shards
    assert_success(user.python("gptlab.train", "name=local", *BLOCKS, f"data.path={server.folder}", steps, *SMALL))
    limited = ("data.cache_limit_gb=5e-5", "data.num_workers=1")  # enough for 4 train shards and the val shards
    assert_success(
        user.python("gptlab.train", "name=remote", *BLOCKS, f"data.path={server.url}", steps, *limited, *SMALL)
    )
    local, remote = user.only_run("local"), user.only_run("remote")
    for name in ("train/loss", "val/loss"):
        assert metrics(remote, name) == metrics(local, name)
    (cache,) = (user.folder / "cache").glob("remote-*")
    assert sum(path.stat().st_size for path in cache.glob("*.bin")) <= 50_000
    assert len([name for name in server.requests if name.startswith("train")]) >= 6

    shown = user.python("gptlab.prepare", f"inspect={server.url}", "verify=true")
    assert_success(shown)
    shards = len(list(server.folder.glob("*.bin")))
    assert f"Verified {shards} shards" in shown.stdout
    assert "line 0: the cat has 0 of 0" in shown.stdout


def test_shards_above_the_cache_limit_are_an_error_before_any_download(user, server):
    done = user.python("gptlab.train", *BLOCKS, f"data.path={server.url}", "data.cache_limit_gb=1e-5", *SMALL)
    assert done.returncode == 2
    assert "data.cache_limit_gb=1e-05 is less than the" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(server.requests) == ["manifest.json"]


ONE_ATTEMPT = """
from gptlab.data.shards import remote
from gptlab.train import main

remote.MAX_ATTEMPTS = 1
main()
"""


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9/data", "http://127.0.0.1:9/data/manifest.json could not be downloaded: Cannot connect"),
        ("http://user:hunter2@127.0.0.1:9/data", "data.path=http://127.0.0.1... contains a password"),
    ],
)
def test_an_unusable_url_is_an_error_that_does_not_reveal_a_password(user, url, message):
    done = user.run(sys.executable, "-c", ONE_ATTEMPT, "data=shards", f"data.path={url}", *SMALL)
    assert done.returncode == 2
    assert f"gptlab: {message}" in done.stderr
    assert "Traceback" not in done.stderr
    assert "hunter2" not in done.stdout + done.stderr
    written = [path for path in user.folder.rglob("*") if path.is_file()]
    assert not [path for path in written if b"hunter2" in path.read_bytes()]


def test_inspection_of_a_url_uses_the_tokenizer_of_its_manifest(user):
    assert_success(
        user.python("gptlab.prepare", "data=text", "data.source=text.txt", "tokenizer=bpe", "tokenizer.vocab_size=300")
    )
    (folder,) = (path for path in (user.folder / "cache").glob("text-*") if path.is_dir())
    shown = user.python("gptlab.prepare", f"inspect=file://{folder}")
    assert_success(shown)
    assert "bpe, 300 token IDs, uint16" in shown.stdout
