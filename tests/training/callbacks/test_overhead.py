"""Garbage is collected at steps that are the same everywhere, and at no other time."""

import gc
import sys
import weakref
from types import SimpleNamespace

import pytest

from gptlab.training.callbacks.overhead import COLLECT_EVERY, GarbageCollection


class Cycle:
    """What only a collection takes away."""

    def __init__(self):
        self.me = self


@pytest.fixture
def enabled():
    gc.enable()
    yield
    gc.unfreeze()
    gc.enable()


def step(garbage, number, *, accumulated=1):
    """The last micro-batch of a step."""
    trainer = SimpleNamespace(accumulate_grad_batches=accumulated, global_step=number)
    garbage.on_train_batch_end(trainer, None, None, None, number * accumulated - 1)


def test_garbage_stays_until_its_turn(enabled):
    garbage = GarbageCollection()
    assert gc.get_freeze_count() == 0
    step(garbage, 1)
    assert not gc.isenabled()
    assert gc.get_freeze_count() > 1000  # all that there was
    for collects in (lambda: step(garbage, COLLECT_EVERY), lambda: garbage.on_validation_end(None, None)):
        left = weakref.ref(Cycle())
        for number in (2, COLLECT_EVERY - 1, COLLECT_EVERY + 1):
            step(garbage, number)
        keep = [[] for _ in range(100_000)]  # Python alone would have looked for garbage by now
        assert left() is not None
        collects()
        assert left() is None
        del keep


NO_CYCLES = """
import gc, sys
from gptlab.training.callbacks.overhead import GarbageCollection
takes_over = GarbageCollection.on_train_batch_end
def counts(self, trainer, *rest):
    takes_over(self, trainer, *rest)
    if trainer.global_step == 5:
        gc.collect()
    if trainer.global_step == 45:
        print("unreachable:", gc.collect(), "enabled:", gc.isenabled())
GarbageCollection.on_train_batch_end = counts
from gptlab.train import main
main()
"""


@pytest.mark.slow
def test_steps_leave_nothing_that_only_a_collection_takes_away(user):
    small = ("data=text", "data.source=text.txt", "model=tiny", "model.block_size=32", "train.max_steps=50")
    rare = ("train.eval_every=50", "train.eval_windows=10", "train.log_every=10")
    done = user.run(sys.executable, "-c", NO_CYCLES, *small, *rare)
    assert done.returncode == 0, done.stderr
    assert "unreachable: 0 enabled: False\n" in done.stdout


@pytest.mark.parametrize("end", ["on_train_end", "on_exception"])
def test_at_the_end_all_is_as_before(enabled, end):
    garbage = GarbageCollection()
    step(garbage, 1)
    getattr(garbage, end)(*(None,) * (2 if end == "on_train_end" else 3))
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_who_has_turned_it_off_keeps_it(enabled):
    gc.disable()
    garbage = GarbageCollection()
    step(garbage, 1)
    garbage.on_train_end(None, None)
    assert (gc.isenabled(), gc.get_freeze_count()) == (False, 0)


def test_nothing_happens_within_a_step(enabled):
    garbage = GarbageCollection()
    trainer = SimpleNamespace(accumulate_grad_batches=2, global_step=0)
    garbage.on_train_batch_end(trainer, None, None, None, 0)
    assert gc.isenabled()
