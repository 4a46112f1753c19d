"""The LightningModule: what one training step and one evaluation are.

Shapes: B sequences of the micro-batch, T time, V vocabulary.
"""

from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from gptlab.data.batches import Batch
from gptlab.evaluation.loss import LossSums
from gptlab.model.gpt import GPT
from gptlab.training.config import AdamWConfig, ScheduleConfig
from gptlab.training.optimizers import build_optimizer
from gptlab.training.schedules import learning_rate
from gptlab.training.strategies import compile_in_place, shard

WEIGHTS = "model."  # where the network hangs in the module; no checkpoint carries it


class GPTModule(L.LightningModule):
    """Trains a GPT.

    Args:
        model: The network, initialised.
        optimizer: Which optimizer, and its values.
        schedule: Which learning-rate schedule, and its values.
        max_steps: Length of the run in optimizer steps.
        grad_clip: Largest gradient norm; 0 does not clip.
        seed: Of everything that is random while training.
        token_bytes: Bytes of text of each id (V,); see ``gptlab.evaluation.loss``.
        compile: Compile the network.
    """

    token_bytes: Tensor

    def __init__(
        self,
        model: GPT,
        *,
        optimizer: AdamWConfig,
        schedule: ScheduleConfig,
        max_steps: int,
        grad_clip: float,
        seed: int,
        token_bytes: Tensor,
        compile: bool,  # noqa: A002  (torch's own word)
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer_config, self.schedule_config, self.max_steps = optimizer, schedule, max_steps
        self.grad_clip, self.seed, self.compile_model = grad_clip, seed, compile
        self.register_buffer("token_bytes", token_bytes, persistent=False)
        self.step_loss = torch.zeros(())  # sum of the losses of the micro-batches of this step, on this rank
        self.grad_norm = torch.zeros(())  # of the last step, before clipping

    def configure_model(self) -> None:
        """Compile and shard the network in place, so that parameters keep their names."""
        if self.compile_model:
            compile_in_place(self.model, by_block=self.device_mesh is not None)
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Optimizer:
        """Build the optimizer; its learning rate is set before every step."""
        wanted = self.optimizer_config.fused
        fused = self.device.type in ("cuda", "cpu") if wanted == "auto" else wanted
        return build_optimizer(self.model, self.optimizer_config, fused=fused)

    def lr(self, step: int) -> float:
        """Learning rate of optimizer step ``step``, counted from 0."""
        return learning_rate(step, self.schedule_config, lr=self.optimizer_config.lr, max_steps=self.max_steps)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the step's learning rate, and make what is random a function of (seed, step, rank)."""
        step, micro = self.trainer.global_step, batch_idx % self.trainer.accumulate_grad_batches
        if micro == 0:
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = self.lr(step)
            self.step_loss = torch.zeros((), device=self.device)
        torch.manual_seed(derive_seed(self.seed, step, self.trainer.global_rank, micro))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of a micro-batch, in nats per token."""
        logits = self.model(batch.idx, batch.documents)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())
        self.step_loss += loss.detach()
        return loss

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        """Clip the norm of all gradients together (Pascanu et al. 2013, algorithm 1), and keep it for the log."""
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.grad_clip, norm)
        self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    def global_step_loss(self) -> float:
        """Mean loss of the finished step over all its micro-batches and ranks; every rank must ask."""
        mean = self.step_loss / self.trainer.accumulate_grad_batches
        return self.trainer.strategy.reduce(mean, reduce_op="mean").item()

    def on_validation_epoch_start(self) -> None:
        """Begin the sums."""
        self.sums = LossSums(self.token_bytes)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the sums."""
        self.sums.add(self.model(batch.idx, batch.documents), batch.targets)

    def on_validation_epoch_end(self) -> None:
        """Publish val/loss and val/bits_per_byte of all ranks' windows together, for callbacks and the log."""
        self.sums.sums = self.trainer.strategy.reduce(self.sums.sums, reduce_op="sum")
        loss, bits_per_byte = self.sums.result()
        self.log_dict({"val/loss": loss, "val/bits_per_byte": bits_per_byte}, logger=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the parameters as GPT-2 does, without the module's prefix."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name.removeprefix(WEIGHTS): tensor for name, tensor in state.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the parameters the module's prefix again (sharded, the strategy has loaded them), and count anew."""
        # Lightning counts micro-batches, of which a step may have had another number before
        done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts.update(dict.fromkeys(counts, done))
        state = checkpoint.get("state_dict", {})
        checkpoint["state_dict"] = {WEIGHTS + name: tensor for name, tensor in state.items()}


def derive_seed(*parts: int) -> int:
    """Mix numbers into one seed of 64 bits (numpy's SeedSequence), the same on every machine."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])
