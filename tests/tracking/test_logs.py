"""What other libraries are not to say."""

import logging

from torch.distributed.tensor import _redistribute

from gptlab.tracking.logs import quiet_lightning


def test_torch_s_advice_on_meshes_is_not_heard():
    quiet_lightning()
    assert not _redistribute.logger.isEnabledFor(logging.WARNING)
    assert _redistribute.logger.isEnabledFor(logging.ERROR)
