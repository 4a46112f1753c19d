"""A loader that knows how long it was waited for, by a clock that stands still but for what the data takes."""

import pytest

from gptlab.training.callbacks.metrics import Stopwatch
from gptlab.training.loader import TimedLoader


@pytest.fixture
def clock(monkeypatch):
    """The time, as a list of one number, which the test moves on."""
    now = [0.0]
    monkeypatch.setattr("gptlab.training.loader.time.perf_counter", lambda: now[0])
    return now


class Slow:
    """Items that take as many seconds as their number."""

    def __init__(self, clock):
        self.clock = clock

    def __getitem__(self, number):
        self.clock[0] += number
        return number


def test_only_the_wait_for_data_is_counted(clock):
    loader = TimedLoader(Slow(clock), batch_size=None, sampler=[3, 5, 7])
    batches = iter(loader)
    waited = []
    for batch in batches:
        waited.append((batch, loader.waited))
        clock[0] += 100  # of work
    assert waited == [(3, 3.0), (5, 8.0), (7, 15.0)]


def test_a_stopwatch_counts_between_run_and_pause():
    now = [0.0]
    watch = Stopwatch(lambda: now[0])
    steps = [("run", 2), ("pause", 30), ("run", 4), ("run", 5), ("read", 7)]  # and the seconds that follow
    for what, seconds in steps[:-1]:
        getattr(watch, what)()
        now[0] += seconds
    assert watch.read() == 2 + 4 + 5
    now[0] += 7
    assert watch.read() == 7  # it went on
