"""DelayedAllReduce: sums over ranks, returned one call later."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gptlab.training.distributed.delayed_all_reduce import DelayedAllReduce


def test_a_single_process_gets_its_values_one_call_later() -> None:
    agreement = DelayedAllReduce()
    assert agreement.collect() is None
    assert agreement.add(torch.tensor([1.0, 2.0])) is None
    assert agreement.add(torch.tensor([3.0, 4.0])) == [1.0, 2.0]
    assert agreement.collect() == [3.0, 4.0]
    assert agreement.collect() is None  # returned only once
    assert agreement.add(torch.tensor([5.0, 6.0])) is None


def test_later_changes_of_the_values_have_no_effect() -> None:
    agreement, values = DelayedAllReduce(), torch.tensor([1.0], dtype=torch.float64)
    agreement.add(values)
    values.zero_()
    assert agreement.collect() == [1.0]


def _rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    agreement = DelayedAllReduce()
    got = [agreement.add(torch.tensor([float(rank), 10.0 * step + rank, 1e-9])) for step in range(3)]
    got.append(agreement.collect())
    torch.save(got, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_get_the_same_sums_one_call_later(tmp_path: Path) -> None:
    mp.spawn(_rank, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
    expected = [None, *([1.0, 20.0 * step + 1, 2 * float(torch.tensor(1e-9))] for step in range(3))]
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == expected
