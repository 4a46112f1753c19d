"""Configuration of a resumed run."""

from configs import resolved
from gptlab.config import resume


def test_a_deleted_callback_is_deleted_from_a_resumed_run(monkeypatch):
    earlier = resolved()
    assert earlier.callbacks.samples is not None
    monkeypatch.setattr(resume, "load_config", lambda *_: earlier)
    resumed = resolved("resume=run", "~callbacks.samples")
    assert resumed.callbacks.samples is None
    assert resumed.callbacks.checkpoint == earlier.callbacks.checkpoint
