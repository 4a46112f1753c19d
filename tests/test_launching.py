"""Launching of runs: one run directory, each job once, no processes left behind, no ports open to the network."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import assert_config_error, assert_same_run, assert_success, metrics
from processes import TWO, processes_of, training

SMALL = ("data=text", "data.source=text.txt", "model=tiny", "train.max_steps=2", "train.eval_windows=4")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def none_left(folder: Path) -> bool:
    until = time.monotonic() + 10
    while processes_of(folder) and time.monotonic() < until:
        time.sleep(0.1)
    return not processes_of(folder)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run_immediately(user, rank):
    run = training(user, *TWO, "data.num_workers=1")
    os.kill(run.workers()[rank], signal.SIGKILL)
    run.ended(128 + signal.SIGKILL, seconds=30)
    assert none_left(user.folder)


@pytest.mark.slow
def test_workers_of_a_run_end_with_a_killed_supervisor(user):
    run = training(user, *TWO, "data.num_workers=1")
    run.kill()
    assert none_left(user.folder)
    run.ended(-signal.SIGKILL, seconds=30)


def listening(pid: int) -> Iterator[str]:
    """Yields the addresses on which a process listens (proc(5): tcp, state 0A)."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed in the meantime
            sockets.add(str(descriptor.readlink()))
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                words = bytes.fromhex(fields[1].partition(":")[0])  # 32-bit words in this machine's byte order
                swapped = b"".join(
                    words[i : i + 4][:: -1 if sys.byteorder == "little" else 1] for i in range(0, len(words), 4)
                )
                yield socket.inet_ntop(family, swapped)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_workers_listen_only_on_the_loopback_interface(user, strategy):
    with socket.socket() as server:  # a check that listening sockets are found
        server.bind(("0.0.0.0", 0))  # noqa: S104
        server.listen()
        assert "0.0.0.0" in listening(os.getpid())  # noqa: S104
    run = training(user, f"trainer={strategy}", "trainer.devices=2")
    found = {address for pid in (run.pid, *run.workers().values()) for address in listening(pid)}
    run.kill()
    run.ended(-signal.SIGKILL)
    assert found == {"127.0.0.1"}  # Gloo's
    assert none_left(user.folder)


@pytest.mark.slow
def test_a_batch_size_that_cannot_be_divided_ends_a_sweep_before_any_run(user):
    done = user.python("gptlab.train", "-m", "name=some", "trainer=cpu", "train.micro_batch_size=7,3,4", *SMALL)
    # 7 does not divide the batch of 12
    assert_config_error(done, "train.micro_batch_size=7: train.global_batch_size=12 is not divisible by")
    assert not (user.folder / "outputs").exists()


@pytest.fixture
def two_nodes() -> Iterator[list[tuple[str, str, str]]]:
    """Two connected network namespaces: name, address and interface of each."""
    nodes = [(f"gptlab-{os.getpid()}-{i}", f"10.213.7.{i + 1}", f"gl{os.getpid() % 100000}{'ab'[i]}") for i in (0, 1)]
    (one, _, left), (two, _, right) = nodes
    commands = [f"ip netns add {one}", f"ip netns add {two}"]
    commands.append(f"ip link add {left} netns {one} type veth peer name {right} netns {two}")
    for name, address, interface in nodes:
        commands.append(f"ip -n {name} addr add {address}/24 dev {interface}")
        commands.extend(f"ip -n {name} link set {device} up" for device in ("lo", interface))
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need iproute2 and root")
    try:
        for command in commands:
            made = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if made.returncode:
                pytest.skip(f"no network namespaces here: {command}: {made.stderr.strip()}")
        yield nodes
    finally:
        for name, _, _ in nodes:
            subprocess.run(("ip", "netns", "del", name), capture_output=True, check=False)


@pytest.mark.slow
def test_torchrun_starts_one_run_on_two_machines(user, two_nodes):
    runs = []
    for number, (name, address, interface) in enumerate(two_nodes):
        where = ("--nnodes=2", f"--node-rank={number}", "--nproc-per-node=1", f"--local-addr={address}")
        # both have this machine's host name, by which torchrun would determine the host of the endpoint
        host = f"--rdzv-conf=is_host={number == 0}"
        meeting = ("--rdzv-backend=c10d", f"--rdzv-endpoint={two_nodes[0][1]}:29513", "--rdzv-id=7", host)
        command = ("ip", "netns", "exec", name, *TORCHRUN, *where, *meeting, "-m", "gptlab.train", "trainer=ddp")
        environment = user.environment | {"GLOO_SOCKET_IFNAME": interface}
        output = (user.folder / f"{name}.log").open("w")
        with output:
            run = subprocess.Popen(
                (*command, "name=nodes", *SMALL), cwd=user.folder, env=environment, stdout=output, stderr=output
            )
        runs.append(run)
    try:
        statuses = [run.wait(timeout=240) for run in runs]
    finally:
        for run in runs:
            run.kill()
    outputs = [(user.folder / f"{name}.log").read_text() for name, _, _ in two_nodes]
    assert statuses == [0, 0], outputs
    directory = user.only_run("nodes")
    assert list(metrics(directory, "train/loss")) == [1, 2]
    assert "".join(outputs).count("tokens: 2 x") == 1
    assert_success(user.python("gptlab.train", "name=one", *SMALL))
    one = user.only_run("one")
    assert metrics(directory, "train/loss") == pytest.approx(metrics(one, "train/loss"), abs=1e-5)


@pytest.mark.slow
def test_processes_that_torchrun_restarts_resume_their_run(user):
    run = (
        "trainer=ddp",
        "data=text",
        "data.source=text.txt",
        "model=tiny",
        "train.max_steps=60",
        "train.eval_windows=4",
    )
    saved = ("train.eval_every=5", "callbacks=checkpoint", "callbacks.checkpoint.keep_last=99")
    assert_success(user.python("gptlab.train", *run, *saved, "trainer.devices=2", "name=whole"))
    restarts = ("--nproc-per-node=2", "--max-restarts=1", "--master-port=29517")
    command = (*TORCHRUN, *restarts, "-m", "gptlab.train", *run, *saved, "name=restarted")
    with (user.folder / "restarted.log").open("w") as output:
        agent = subprocess.Popen(command, cwd=user.folder, env=user.environment, stdout=output, stderr=output)
    try:
        until = time.monotonic() + 120
        while not list(user.folder.glob("outputs/restarted/*/checkpoints/step_000005")):
            assert agent.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        ranks = subprocess.check_output(("pgrep", "-P", str(agent.pid)), text=True).split()
        os.kill(int(ranks[1]), signal.SIGKILL)
        assert agent.wait(timeout=240) == 0, (user.folder / "restarted.log").read_text()
    finally:
        agent.kill()
    restarted = user.only_run("restarted")
    assert_same_run(user.only_run("whole"), restarted)
    assert (restarted / "train.log").read_text().count("INFO model ") == 2
