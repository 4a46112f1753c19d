"""Garbage collection at the same steps on all ranks, and at no other time."""

import gc
import sys
import weakref
from types import SimpleNamespace

import pytest

from gptlab.training.callbacks.overhead import COLLECT_EVERY, GarbageCollection


class Cycle:
    """Object that only the garbage collector frees."""

    def __init__(self):
        self.me = self


@pytest.fixture
def enabled():
    gc.enable()
    yield
    gc.unfreeze()
    gc.enable()


def step(garbage, number, *, accumulated=1):
    """Ends the last micro-batch of a step."""
    trainer = SimpleNamespace(accumulate_grad_batches=accumulated, global_step=number)
    garbage.on_train_batch_end(trainer, None, None, None, number * accumulated - 1)


def test_garbage_is_collected_only_at_the_scheduled_steps(enabled):
    garbage = GarbageCollection()
    assert gc.get_freeze_count() == 0
    step(garbage, 1)
    assert not gc.isenabled()
    assert gc.get_freeze_count() > 1000  # all existing objects
    for collect in (lambda: step(garbage, COLLECT_EVERY), lambda: garbage.on_validation_end(None, None)):
        left = weakref.ref(Cycle())
        for number in (2, COLLECT_EVERY - 1, COLLECT_EVERY + 1):
            step(garbage, number)
        keep = [[] for _ in range(100_000)]  # would trigger automatic collection
        assert left() is not None
        collect()
        assert left() is None
        del keep


NO_CYCLES = """
import gc, sys
from gptlab.training.callbacks.overhead import GarbageCollection
on_train_batch_end = GarbageCollection.on_train_batch_end
def count_garbage(self, trainer, *rest):
    on_train_batch_end(self, trainer, *rest)
    if trainer.global_step == 5:
        gc.collect()
    if trainer.global_step == 45:
        print("unreachable:", gc.collect(), "enabled:", gc.isenabled())
GarbageCollection.on_train_batch_end = count_garbage
from gptlab.train import main
main()
"""


@pytest.mark.slow
def test_training_steps_create_no_reference_cycles(user):
    small = ("data=text", "data.source=text.txt", "model=tiny", "model.block_size=32", "train.max_steps=50")
    rare = ("train.eval_every=50", "train.eval_windows=10", "train.log_every=10")
    done = user.run(sys.executable, "-c", NO_CYCLES, *small, *rare)
    assert done.returncode == 0, done.stderr
    assert "unreachable: 0 enabled: False\n" in done.stdout


@pytest.mark.parametrize("end", ["on_train_end", "on_exception"])
def test_automatic_collection_is_restored_at_the_end(enabled, end):
    garbage = GarbageCollection()
    step(garbage, 1)
    getattr(garbage, end)(*(None,) * (2 if end == "on_train_end" else 3))
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_disabled_automatic_collection_stays_disabled(enabled):
    gc.disable()
    garbage = GarbageCollection()
    step(garbage, 1)
    garbage.on_train_end(None, None)
    assert (gc.isenabled(), gc.get_freeze_count()) == (False, 0)


def test_a_micro_batch_within_a_step_has_no_effect(enabled):
    garbage = GarbageCollection()
    trainer = SimpleNamespace(accumulate_grad_batches=2, global_step=0)
    garbage.on_train_batch_end(trainer, None, None, None, 0)
    assert gc.isenabled()
