import signal

import pytest

from gptlab.training.callbacks.metrics import Stopwatch, defer_interrupt


@pytest.fixture(autouse=True)
def interrupts_arrive():
    """Who started the tests may have them ignored."""
    owner = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, owner)


def interrupted(times: int) -> list[str]:
    """What is written by somebody who is interrupted before it."""
    written = []

    def write() -> None:
        with defer_interrupt():
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            written.append("row")

    with pytest.raises(KeyboardInterrupt):
        write()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return written


def test_an_interrupt_waits_until_the_row_is_written():
    assert interrupted(1) == ["row"]


def test_a_second_interrupt_does_not_wait():
    assert interrupted(2) == []


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
