"""GPTModule: random seeds and resuming at a step."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from conftest import defaults
from gptlab.training.config import TrainConfig
from gptlab.training.module import GPTModule, seed_generators


def test_seed_generators_matches_torch_manual_seed():
    for seed in (0, 7, 2**64 - 1):
        torch.manual_seed(seed)
        expected = torch.rand(3), torch.nn.functional.dropout(torch.ones(64))
        torch.rand(5)
        seed_generators(seed)
        found = torch.rand(3), torch.nn.functional.dropout(torch.ones(64))
        assert all(map(torch.equal, found, expected))
        if torch.cuda.is_available():
            torch.manual_seed(seed)
            drawn = torch.rand(3, device="cuda")
            seed_generators(seed)
            assert torch.equal(torch.rand(3, device="cuda"), drawn)


class Resuming(BoringModel):
    """Model that sets Lightning's progress to step 5, as a GPTModule does when it loads a checkpoint."""

    config = SimpleNamespace(optimizer=None)

    def setup(self, stage):
        GPTModule.on_load_checkpoint(self, {"global_step": 5})


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_lightning_continues_at_the_step_of_a_checkpoint(micro_batches):
    seen: list[tuple[int, int]] = []

    class Steps(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((trainer.global_step, trainer.fit_loop.total_batch_idx))

        def on_validation_end(self, trainer, pl_module):
            seen.append((trainer.global_step, -1))

    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=7,
        max_epochs=-1,
        accumulate_grad_batches=micro_batches,
        val_check_interval=2 * micro_batches,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        callbacks=[Steps()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Resuming())
    fifth, sixth = ([(step, step * micro_batches + micro) for micro in range(micro_batches)] for step in (5, 6))
    assert seen == [*fifth, (6, -1), *sixth]  # evaluated at even steps, as in an uninterrupted run
    assert trainer.global_step == 7


@pytest.mark.parametrize(("mode", "is_kept"), [("max-autotune", True), ("default", False)])
def test_gradients_are_accumulated_outside_of_the_memory_of_cuda_graphs(monkeypatch, mode, is_kept):
    module = GPTModule.__new__(GPTModule)
    torch.nn.Module.__init__(module)
    monkeypatch.setattr(GPTModule, "device", torch.device("cuda"))
    module.model, module.compile_target = torch.nn.Linear(3, 2), "whole"
    module.model.bias.requires_grad_(False)
    monkeypatch.setattr(GPTModule, "trainer", SimpleNamespace(accumulate_grad_batches=2))
    train = TrainConfig(**defaults("train.yaml")["train"] | {"compile_mode": mode})
    module.config = SimpleNamespace(train=train)
    weight, optimizer, kept = module.model.weight, torch.optim.SGD(module.model.parameters()), set()
    for step in range(3):
        inputs = torch.randn(2, 5, 3)
        for micro in range(2):
            loss = module.model(inputs[micro]).square().sum()
            if micro == 0:
                module.optimizer_zero_grad(0, 2 * step, optimizer)
                assert (weight.grad is not None) == is_kept
                kept.add(weight.grad.data_ptr() if is_kept else None)
            loss.backward()
        expected = sum(torch.autograd.grad(module.model(rows).square().sum(), weight)[0] for rows in inputs)
        torch.testing.assert_close(weight.grad, expected, rtol=1e-6, atol=1e-6)
        assert not is_kept or kept == {weight.grad.data_ptr()}
    assert module.model.bias.grad is None
