"""TimedLoader: seconds spent waiting for data, measured with a clock that only the data advances."""

import pytest

from gptlab.training.datamodule import TimedLoader


@pytest.fixture
def clock(monkeypatch):
    """Replaces the clock with a list of one number, which the test increases."""
    now = [0.0]
    monkeypatch.setattr("gptlab.training.datamodule.time.perf_counter", lambda: now[0])
    return now


class Slow:
    """Dataset in which loading item n takes n seconds."""

    def __init__(self, clock):
        self.clock = clock

    def __getitem__(self, number):
        self.clock[0] += number
        return number


def test_only_waiting_for_data_is_measured(clock):
    loader = TimedLoader(Slow(clock), batch_size=None, sampler=[3, 5, 7])
    batches = iter(loader)
    waited = []
    for batch in batches:
        waited.append((batch, loader.waited))
        clock[0] += 100  # training
    assert waited == [(3, 3.0), (5, 8.0), (7, 15.0)]
