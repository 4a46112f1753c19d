"""The LightningModule: what one training step and one evaluation are.

Shapes: B sequences of the micro-batch, T time, V vocabulary.
"""

from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from gptlab.data.batches import Batch
from gptlab.evaluation.loss import LossSums
from gptlab.model.gpt import GPT
from gptlab.training.config import OptimizerConfig, ScheduleConfig
from gptlab.training.distributed.fsdp import FSDP2Strategy
from gptlab.training.distributed.strategies import (
    compile_in_place,
    data_rank,
    reduce_over_data_ranks,
    refresh_gathered_weights,
)
from gptlab.training.optim.averaging import enable_averaging, set_decay, swap_in_averages, swap_out_averages
from gptlab.training.optim.optimizers import (
    build_optimizer,
    group_names,
    name_state,
    number_state,
    set_step_hyperparameters,
    skip_step_if,
)
from gptlab.training.optim.schedules import learning_rate

WEIGHTS = "model."  # where the network hangs in the module; no checkpoint carries it


class GPTModule(L.LightningModule):
    """Trains a GPT.

    Args:
        model: The network, initialised.
        optimizer: Which optimizer, and its values.
        schedule: Which learning-rate schedule, and its values.
        max_steps: Length of the run in optimizer steps.
        grad_clip: Largest gradient norm; 0 does not clip.
        ema_decay: Of the average of the weights; None keeps none.
        seed: Of everything that is random while training.
        token_bytes: Bytes of text of each id (V,); see ``gptlab.evaluation.loss``.
        compile: What of the network to compile, if anything; see ``gptlab.training.devices.Devices``.
        compile_mode: One of torch.compile's.
        micro_batch_sizes: How many sizes the micro-batches of the run have, for each of which it is compiled.
        loss_chunk: Tokens whose logits are there at a time; None has those of a micro-batch at once.
    """

    token_bytes: Tensor

    def __init__(
        self,
        model: GPT,
        *,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        max_steps: int,
        grad_clip: float,
        ema_decay: float | None,
        seed: int,
        token_bytes: Tensor,
        compile: Literal[False, "whole", "blocks"],  # noqa: A002  (torch's own word)
        compile_mode: str,
        micro_batch_sizes: int,
        loss_chunk: int | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer_config, self.schedule_config, self.max_steps = optimizer, schedule, max_steps
        self.grad_clip, self.ema_decay, self.seed, self.loss_chunk = grad_clip, ema_decay, seed, loss_chunk
        self.compile_what, self.compile_mode, self.micro_batch_sizes = compile, compile_mode, micro_batch_sizes
        self.register_buffer("token_bytes", token_bytes, persistent=False)
        self.step_loss = torch.zeros(())  # sum of the losses of the micro-batches of this step, on this rank
        self.grad_norm = torch.zeros(())  # of the last step, before clipping
        self.bad_step = torch.zeros(())  # 1 where that norm is not finite, and the step was skipped; else 0
        self.group_names: list[str] = []  # of the optimizer, where its groups have learning rates of their own
        self._trained: list[tuple[Tensor, Tensor]] = []  # the weights, while their averages are in their place

    def configure_model(self) -> None:
        """Compile and shard the network in place, so that parameters keep their names."""
        if self.compile_what:
            compile_in_place(self.model, self.compile_what, self.compile_mode, shapes=self.micro_batch_sizes)
        if isinstance(self.trainer.strategy, FSDP2Strategy):
            self.trainer.strategy.shard(self.model)

    def configure_optimizers(self) -> Optimizer:
        """Build the optimizer; its learning rates are set before every step."""
        wanted = self.optimizer_config.fused
        fused = self.device.type in ("cuda", "cpu") if wanted == "auto" else wanted
        optimizer = build_optimizer(self.model, self.optimizer_config, fused=fused)
        self.group_names = group_names(self.model, self.optimizer_config)
        if self.ema_decay is not None:
            enable_averaging(optimizer, self.ema_decay)
        return optimizer

    def lr(self, step: int) -> float:
        """Learning rate of optimizer step ``step``, counted from 0; of Muon's, that of the matrices."""
        return learning_rate(step, self.schedule_config, lr=self.optimizer_config.lr, max_steps=self.max_steps)

    def group_lrs(self) -> dict[str, float]:
        """Learning rates of the groups at the step that was just made, where they have rates of their own."""
        (optimizer,) = self.trainer.optimizers
        groups = optimizer.param_groups[: len(self.group_names)]
        return {f"lr/{name}": group["lr"] for name, group in zip(self.group_names, groups, strict=True)}

    @torch.no_grad()
    def weight_norm(self) -> float:
        """Norm of all weights together, each counted once; every rank must ask."""
        norm = torch.nn.utils.get_total_norm(list(self.model.parameters()))
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the step's learning rates, and make what is random a function of (seed, step, share of the data)."""
        step, micro = self.trainer.global_step, batch_idx % self.trainer.accumulate_grad_batches
        if micro == 0:
            (optimizer,) = self.trainer.optimizers
            set_step_hyperparameters(
                optimizer, step, self.optimizer_config, self.schedule_config, max_steps=self.max_steps
            )
            if self.ema_decay is not None:
                set_decay(optimizer, step, self.ema_decay)
            self.step_loss = torch.zeros((), device=self.device)
        seed_generators(derive_seed(self.seed, step, data_rank(self.trainer), micro))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of a micro-batch, in nats per token."""
        if self.compile_mode != "default":
            torch.compiler.cudagraph_mark_step_begin()  # what the graph returned before may be overwritten
        loss = self.model.loss(batch.idx, batch.targets, batch.documents, self.loss_chunk)
        self.step_loss += loss.detach()
        return loss

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        """Clip the norm of all gradients together (Pascanu et al. 2013, algorithm 1), and keep it for the log.

        A step whose norm is not finite is skipped: it counts, as its tokens are consumed, but changes nothing.
        """
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.grad_clip, norm)
        self.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.skip_if_bad(optimizer)

    def skip_if_bad(self, optimizer: Optimizer) -> None:
        """Skip the step where the norm of its gradient is not finite."""
        self.bad_step = 1 - self.grad_norm.isfinite().float()
        skip_step_if(optimizer, self.bad_step)

    def global_step_loss(self) -> float:
        """Mean loss of the finished step over all its tokens, on all ranks; every rank must ask.

        Micro-batches have equally many tokens, all of which are scored: the mean of their means is that of the tokens.
        """
        return reduce_over_data_ranks(
            self.step_loss / self.trainer.accumulate_grad_batches, self.trainer, "mean"
        ).item()

    def on_validation_start(self) -> None:
        """Evaluate, and sample, the average of the weights where one is kept."""
        self._trained = swap_in_averages(self.trainer.optimizers)
        if self._trained:
            refresh_gathered_weights(self.trainer.strategy)

    def on_validation_end(self) -> None:
        """Go on with the trained weights; a checkpoint has done so before, since it has these and the average."""
        swap_out_averages(self._trained)
        if self._trained:
            refresh_gathered_weights(self.trainer.strategy)
        self._trained = []

    def on_validation_epoch_start(self) -> None:
        """Begin the sums."""
        self.sums = LossSums(self.token_bytes)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the sums."""
        losses = self.model.token_losses(batch.idx, batch.targets, batch.documents, self.loss_chunk)
        self.sums.add(losses, batch.targets)

    def on_validation_epoch_end(self) -> None:
        """Publish val/loss and val/bits_per_byte of all ranks' windows together, for callbacks and the log."""
        self.sums.sums = reduce_over_data_ranks(self.sums.sums, self.trainer, "sum")
        loss, bits_per_byte = self.sums.result()
        self.log_dict({"val/loss": loss, "val/bits_per_byte": bits_per_byte}, logger=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the parameters as GPT-2 does, without the module's prefix, their moments too; the step says the rest."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name.removeprefix(WEIGHTS): tensor for name, tensor in state.items()}
        states, config = checkpoint["optimizer_states"], self.optimizer_config
        # a rank that does not write the one file that all are gathered into has none
        checkpoint["optimizer_states"] = [name_state(state, self.model, config) for state in states if state]
        del checkpoint["loops"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Undo that (sharded, the strategy has loaded them), and let Lightning stand at the step.

        Lightning's loops have no public way to be set to a step, and what they would restore themselves counts
        micro-batches, of which a step may have had another number before. So their counters are set here (read in
        lightning 2.6.6).
        """
        step, epoch = checkpoint["global_step"], self.trainer.fit_loop.epoch_loop
        epoch.automatic_optimization.optim_progress.optimizer.step.total.completed = step
        done = step * self.trainer.accumulate_grad_batches
        epoch.batch_progress.total.load_state_dict(dict.fromkeys(epoch.batch_progress.total.state_dict(), done))
        state = checkpoint.get("state_dict", {})
        checkpoint["state_dict"] = {WEIGHTS + name: tensor for name, tensor in state.items()}
        states, config = checkpoint.get("optimizer_states", []), self.optimizer_config
        checkpoint["optimizer_states"] = [number_state(state, self.model, config) for state in states]


def seed_generators(seed: int) -> None:
    """Seed what draws while training, as torch.manual_seed does.

    That formats this thread's stack for every kind of device that is not in use, at every call: a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def derive_seed(*parts: int) -> int:
    """Mix numbers into one seed of 64 bits (numpy's SeedSequence), the same on every machine."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])
