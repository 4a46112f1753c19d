"""How long training waits for data, by a clock that stands still except while the data is read."""

import pytest

from gptlab.training.datamodule import TimedLoader


@pytest.fixture
def clock(monkeypatch):
    """The time, as a list of one number, which the test moves on."""
    now = [0.0]
    monkeypatch.setattr("gptlab.training.datamodule.time.perf_counter", lambda: now[0])
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
