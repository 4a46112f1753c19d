"""Faults injected into the training steps of a command, in all its processes."""

from pathlib import Path

from conftest import User

# Python imports sitecustomize at startup. Processes that do not train skip the import of torch.
PATCH = """
import os, sys
if {"gptlab.train", "gptlab.worker", "submitit.core._submit"} & set(sys.orig_argv):
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
    """Runs the code ``fault`` in every training step of later commands, with self, loss, step (from 1) and rank."""
    folder = Path(user.folder) / "faults"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(PATCH.replace("FAULT", fault))
    others = user.environment.get("PYTHONPATH")
    user.environment["PYTHONPATH"] = str(folder) if others is None else f"{folder}:{others}"
