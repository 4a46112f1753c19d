"""The LightningModule: training step, validation, and the contents of checkpoints.

Shapes: B sequences of the micro-batch, T time, V vocabulary.
"""

from contextlib import suppress
from typing import Any, Literal, Protocol

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gptlab.config.components import bind_component
from gptlab.data.batches import Batch
from gptlab.evaluation.loss import LossSums
from gptlab.model.config import GPTConfig
from gptlab.model.gpt import GPT
from gptlab.training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from gptlab.training.distributed.fsdp import FSDP2Strategy
from gptlab.training.distributed.strategies import (
    compile_in_place,
    data_rank,
    full_tensor,
    reduce_over_data_ranks,
    refresh_gathered_weights,
)
from gptlab.training.optim.averaging import enable_averaging, set_decay, swap_in_averages, swap_out_averages
from gptlab.training.optim.optimizers import (
    SkippedStep,
    build_optimizer,
    group_names,
    name_state,
    number_state,
    set_step_hyperparameters,
    skip_step_if,
)
from gptlab.training.optim.schedules import learning_rate

MODEL_PREFIX = "model."  # prefix of parameter names in the LightningModule, which checkpoints omit


class TrainingConfig(Protocol):
    """The part of a run's configuration that the module reads; see ``gptlab.config.schema.RunConfig``."""

    @property
    def seed(self) -> int:
        """Seed of all random numbers in training."""

    @property
    def model(self) -> GPTConfig:
        """The model."""

    @property
    def loss(self) -> dict[str, Any] | None:
        """The loss function, if it is a component."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """The optimizer and its hyperparameters."""

    @property
    def schedule(self) -> ScheduleConfig:
        """The learning-rate schedule and its parameters."""

    @property
    def train(self) -> TrainConfig:
        """Length, batch size and intervals of the run."""

    @property
    def steps(self) -> int:
        """Length of the run in optimizer steps."""


class GPTModule(L.LightningModule):
    """LightningModule that trains a GPT.

    Args:
        model: The initialized model.
        config: The run's configuration.
        token_bytes: Number of bytes of text of each token ID (V,); see ``gptlab.evaluation.loss``.
        compile: Which part of the model to compile, if any; see ``gptlab.training.hardware.Hardware``.
        loss_chunk: Number of tokens whose logits are computed at a time; None for all tokens.

    Attributes:
        token_bytes: Number of bytes of text of each token ID (V,); not part of checkpoints.
        step_loss: Sum () of the losses of this step's micro-batches on this rank.
        grad_norm: Gradient norm () of the last step, before clipping.
        bad_step: 1 if that norm is not finite, so that the step was skipped; otherwise 0.
        group_names: Names of the optimizer's parameter groups, if each has its own learning rate; otherwise empty.
    """

    token_bytes: Tensor

    def __init__(
        self,
        model: GPT,
        config: TrainingConfig,
        *,
        token_bytes: Tensor,
        compile: Literal[False, "whole", "blocks"],  # noqa: A002  (PyTorch's name)
        loss_chunk: int | None,
    ) -> None:
        super().__init__()
        self.model, self.config, self.compile_target = model, config, compile
        self.max_steps, self.ema_decay = config.steps, config.train.ema_decay
        self.loss_chunk = loss_chunk
        self.loss_function = bind_component(config.loss) if config.loss else None
        self.register_buffer("token_bytes", token_bytes, persistent=False)
        self.step_loss = torch.zeros(())
        self.grad_norm = torch.zeros(())
        self.bad_step = torch.zeros(())
        self.group_names: list[str] = []
        self._raw_weights: list[tuple[Tensor, Tensor]] = []  # trained weights while the averages are swapped in

    def configure_model(self) -> None:
        """Compiles and shards the model in place, so that parameters keep their names."""
        if self.compile_target:
            train = self.config.train
            shapes = len(train.stages.sizes)  # one micro-batch size for each stage
            compile_in_place(self.model, self.compile_target, train.compile_mode, shapes=shapes)
        if isinstance(self.trainer.strategy, FSDP2Strategy):
            self.trainer.strategy.shard(self.model)

    def configure_optimizers(self) -> Optimizer:
        """Builds the optimizer; its learning rates are set before every step."""
        config = self.config.optimizer
        fused = self.device.type in ("cuda", "cpu") if config.fused == "auto" else config.fused
        optimizer = build_optimizer(self.model, config, fused=fused)
        self.group_names = group_names(self.model, config)
        if self.ema_decay is not None:
            enable_averaging(optimizer, self.ema_decay)
        return optimizer

    def lr(self, step: int) -> float:
        """Returns the learning rate of optimizer step ``step``, counted from 0; with Muon, that of the matrices."""
        return learning_rate(step, self.config.schedule, lr=self.config.optimizer.lr, max_steps=self.max_steps)

    def group_lrs(self) -> dict[str, float]:
        """Returns the learning rate of each parameter group at the last step, by metric name (``lr/<group>``).

        Empty if all groups have the same learning rate.
        """
        (optimizer,) = self.trainer.optimizers
        groups = optimizer.param_groups[: len(self.group_names)]
        return {f"lr/{name}": group["lr"] for name, group in zip(self.group_names, groups, strict=True)}

    @torch.no_grad()
    def weight_norm(self) -> float:
        """Returns the norm of all weights, each counted once. Collective: every rank must call it."""
        norm = torch.nn.utils.get_total_norm(list(self.model.parameters()))
        return full_tensor(norm).item()

    def on_train_start(self) -> None:
        """With DDP, performs backward passes without effect, after which the buckets of the all-reduce do not change.

        DDP reduces all gradients in one bucket until it has recorded the order in which it receives them: in the second
        backward pass of a static graph, otherwise in the first. The rounding of a sum over three or more ranks depends
        on its position in the bucket. Without these passes, the first steps after a resume would be rounded differently
        from those of an uninterrupted run. The sum over two ranks is rounded alike at every position.
        """
        if not isinstance(self.trainer.strategy.model, DistributedDataParallel) or self.trainer.world_size < 3:
            return
        self.step_loss = torch.zeros((), device=self.device)
        idx = torch.zeros((1, self.config.model.block_size), dtype=torch.long, device=self.device)
        for _ in range(2):
            with torch.compiler.set_stance("force_eager"):
                loss = self.trainer.strategy.training_step(Batch(idx, idx, None), 0)
            assert isinstance(loss, Tensor)  # noqa: S101
            loss.backward()
            self.zero_grad()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Sets the step's learning rates and seeds the generators from (seed, step, data rank, micro-batch)."""
        step, micro = self.trainer.global_step, batch_idx % self.trainer.accumulate_grad_batches
        if micro == 0:
            (optimizer,) = self.trainer.optimizers
            set_step_hyperparameters(
                optimizer, step, self.config.optimizer, self.config.schedule, max_steps=self.max_steps
            )
            if self.ema_decay is not None:
                set_decay(optimizer, step, self.ema_decay)
            self.step_loss = torch.zeros((), device=self.device)
        seed_generators(derive_seed(self.config.seed, step, data_rank(self.trainer), micro))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the mean loss of a micro-batch, in nats per token.

        Args:
            batch: Micro-batch whose ``idx`` and ``targets`` have shape (B, T).
            batch_idx: Lightning's index of the micro-batch; not used.

        Returns:
            Scalar loss () with gradient.
        """
        if self.config.train.compile_mode != "default":
            torch.compiler.cudagraph_mark_step_begin()  # outputs of the previous call may be overwritten
        loss = self.model.loss(batch.idx, batch.targets, batch.documents, self.loss_chunk, self.loss_function)
        self.step_loss += loss.detach()
        return loss

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clears the gradients. With CUDA graphs and accumulation, they are zeros outside of the graphs' memory.

        Otherwise, autograd would keep the gradient that the first micro-batch returns, and the graph of the second
        would overwrite it. It adds to a gradient that exists.
        """
        is_kept = self.compile_target and self.device.type == "cuda" and self.trainer.accumulate_grad_batches > 1
        if not (is_kept and self.config.train.uses_cuda_graphs):
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)
            return
        optimizer.zero_grad(set_to_none=False)
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Performs a step of the optimizer, unless its closure, which computes and clips the gradients, skips it."""
        with suppress(SkippedStep):
            super().optimizer_step(*args, **kwargs)

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        """Clips the global gradient norm (Pascanu et al. 2013, algorithm 1) and stores it in ``grad_norm``.

        A step whose norm is not finite is skipped: weights and optimizer state do not change, but the step is counted.
        """
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if (grad_clip := self.config.train.grad_clip) > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
        self.grad_norm = full_tensor(norm)
        self.skip_if_bad(optimizer)

    def skip_if_bad(self, optimizer: Optimizer) -> None:
        """Skips the step if its gradient norm is not finite."""
        self.bad_step = 1 - self.grad_norm.isfinite().float()
        skip_step_if(optimizer, self.bad_step)

    def global_step_loss(self) -> float:
        """Returns the mean loss of the last step over its tokens on all ranks. Collective: every rank must call it.

        All micro-batches have the same number of scored tokens, so the mean of their means is the mean over tokens.
        """
        return reduce_over_data_ranks(
            self.step_loss / self.trainer.accumulate_grad_batches, self.trainer, "mean"
        ).item()

    def on_validation_start(self) -> None:
        """Swaps in the averages of the weights, if averaging is enabled, for evaluation and samples."""
        self._raw_weights = swap_in_averages(self.trainer.optimizers)
        if self._raw_weights:
            refresh_gathered_weights(self.trainer.strategy)

    def on_validation_end(self) -> None:
        """Restores the trained weights, unless this was already done to save a checkpoint."""
        swap_out_averages(self._raw_weights)
        if self._raw_weights:
            refresh_gathered_weights(self.trainer.strategy)
        self._raw_weights = []

    def on_validation_epoch_start(self) -> None:
        """Resets the loss sums."""
        self.sums = LossSums(self.token_bytes)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the losses (B, T) of a batch to the sums that give val/loss and val/bits_per_byte.

        Args:
            batch: Micro-batch whose ``idx`` and ``targets`` have shape (B, T).
            batch_idx: Lightning's index of the batch; not used.
        """
        losses = self.model.token_losses(batch.idx, batch.targets, batch.documents, self.loss_chunk)
        self.sums.add(losses, batch.targets)

    def on_validation_epoch_end(self) -> None:
        """Logs val/loss and val/bits_per_byte over the windows of all ranks to Lightning's callback metrics."""
        self.sums.sums = reduce_over_data_ranks(self.sums.sums, self.trainer, "sum")
        loss, bits_per_byte = self.sums.result()
        self.log_dict({"val/loss": loss, "val/bits_per_byte": bits_per_byte}, logger=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores parameters and optimizer state by GPT-2's names, without prefix; omits Lightning's loop state."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name.removeprefix(MODEL_PREFIX): tensor for name, tensor in state.items()}
        states, config = checkpoint["optimizer_states"], self.config.optimizer
        # for a checkpoint in one file, the optimizer state is empty on all ranks but the first
        checkpoint["optimizer_states"] = [name_state(state, self.model, config) for state in states if state]
        del checkpoint["loops"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores Lightning's progress and the module's parameter names, unless the strategy has loaded shards.

        Lightning has no public way to set its loops to a step. The state that they would save counts micro-batches,
        whose number per step may have changed. Therefore this method sets their counters (read in lightning 2.6.6).
        """
        step, epoch = checkpoint["global_step"], self.trainer.fit_loop.epoch_loop
        epoch.automatic_optimization.optim_progress.optimizer.step.total.completed = step
        done = step * self.trainer.accumulate_grad_batches
        epoch.batch_progress.total.load_state_dict(dict.fromkeys(epoch.batch_progress.total.state_dict(), done))
        state = checkpoint.get("state_dict", {})
        checkpoint["state_dict"] = {MODEL_PREFIX + name: tensor for name, tensor in state.items()}
        states, config = checkpoint.get("optimizer_states", []), self.config.optimizer
        checkpoint["optimizer_states"] = [number_state(state, self.model, config) for state in states]


def seed_generators(seed: int) -> None:
    """Seeds the random number generators of the CPU and, if it is initialized, of CUDA.

    torch.manual_seed is not used, because it also formats this thread's stack for every unused device type, which takes
    a millisecond per call.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def derive_seed(*parts: int) -> int:
    """Mixes numbers into one 64-bit seed (numpy's SeedSequence), the same on every machine."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])
