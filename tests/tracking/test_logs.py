"""Logging to the console, and silencing of other libraries' log messages."""

import logging

from torch.distributed.tensor import _collective_utils, _redistribute

from gptlab.tracking.logs import ConsoleHandler, log_to_console, quiet_lightning


def test_quiet_lightning_silences_torchs_warnings_about_meshes():
    quiet_lightning()
    for module in (_redistribute, _collective_utils):
        assert not module.logger.isEnabledFor(logging.WARNING)
        assert module.logger.isEnabledFor(logging.ERROR)


def test_messages_are_not_printed_twice_if_hydra_logs_to_the_console(monkeypatch):
    logger = logging.getLogger("gptlab")
    monkeypatch.setattr(logger, "handlers", [])
    for _ in range(2):
        log_to_console()
        assert [type(handler) for handler in logger.handlers] == [ConsoleHandler]
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler()])  # as hydra/job_logging=default does
    log_to_console()
    assert logger.handlers == []
