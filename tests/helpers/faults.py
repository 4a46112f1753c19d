"""Training steps that go wrong on purpose, in every process of a command."""

from pathlib import Path

from conftest import User

# Python imports sitecustomize as it starts; the processes that do not train are spared the import of torch
PATCH = """
import os, sys
if {"gptlab.train", "gptlab.worker"} & set(sys.orig_argv):
    import torch
    from gptlab.training.module import GPTModule
    plain = GPTModule.training_step
    def training_step(self, batch, batch_idx):
        step, rank = self.trainer.global_step + 1, self.trainer.global_rank
        loss = plain(self, batch, batch_idx)
        FAULT
        return loss
    GPTModule.training_step = training_step
"""


def break_steps(user: User, fault: str) -> None:
    """Run ``fault`` in every training step from here on; it knows self, loss, step (from 1) and rank."""
    folder = Path(user.folder) / "faults"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(PATCH.replace("FAULT", fault))
    others = user.environment.get("PYTHONPATH")
    user.environment["PYTHONPATH"] = str(folder) if others is None else f"{folder}:{others}"
