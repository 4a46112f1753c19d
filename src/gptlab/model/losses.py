"""Loss functions for ``loss._target_``; see ``gptlab.model.gpt.GPT.loss``.

Shapes: N tokens, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor

from gptlab.model.loss import IGNORED


def z_loss(logits: Tensor, targets: Tensor, *, coefficient: float) -> Tensor:
    """Returns the cross-entropy () plus a penalty on the log of the softmax normalizer Z.

    The penalty is ``coefficient`` times the mean of (log Z)^2, which keeps the logits from drifting (Chowdhery et al.
    2022, PaLM, section 5).

    Args:
        logits: Logits (N, V).
        targets: Token IDs (N,), -100 where not scored.
        coefficient: Weight of the penalty; PaLM uses 1e-4.
    """
    scored = targets != IGNORED
    log_z = logits.logsumexp(dim=1)
    penalty = (log_z.square() * scored).sum() / scored.sum()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED) + coefficient * penalty


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, *, smoothing: float) -> Tensor:
    """Returns the cross-entropy () with label smoothing (Szegedy et al. 2016, section 7).

    Args:
        logits: Logits (N, V).
        targets: Token IDs (N,), -100 where not scored.
        smoothing: Probability mass, from 0 to 1, that is spread evenly over the vocabulary.
    """
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=smoothing)
