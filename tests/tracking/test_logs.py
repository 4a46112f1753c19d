"""Silencing of other libraries' log messages."""

import logging

from torch.distributed.tensor import _redistribute

from gptlab.tracking.logs import quiet_lightning


def test_quiet_lightning_silences_torchs_warnings_about_meshes():
    quiet_lightning()
    assert not _redistribute.logger.isEnabledFor(logging.WARNING)
    assert _redistribute.logger.isEnabledFor(logging.ERROR)
