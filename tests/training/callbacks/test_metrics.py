import signal

import pytest

from gptlab.training.callbacks.metrics import Stopwatch, defer_interrupt


@pytest.fixture(autouse=True)
def interrupts_arrive():
    """Enables SIGINT, which the process that started the tests may ignore."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def interrupted(times: int) -> list[str]:
    """Returns the rows that are written if ``times`` interrupts arrive before the write."""
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


def test_an_interrupt_is_deferred_until_the_row_is_written():
    assert interrupted(1) == ["row"]


def test_a_second_interrupt_is_not_deferred():
    assert interrupted(2) == []


def test_a_stopwatch_measures_time_between_run_and_pause():
    now = [0.0]
    watch = Stopwatch(lambda: now[0])
    steps = [("run", 2), ("pause", 30), ("run", 4), ("run", 5), ("read", 7)]  # each with the seconds that follow
    for method, seconds in steps[:-1]:
        getattr(watch, method)()
        now[0] += seconds
    assert watch.read() == 2 + 4 + 5
    now[0] += 7
    assert watch.read() == 7  # it continued to run
