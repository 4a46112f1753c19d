"""Import of nanoGPT checkpoints and its errors. tests/test_init_from.py resumes one."""

import shutil
from pathlib import Path

import pytest
import torch

from configs import resolved
from gptlab.config.schema import RunConfig
from gptlab.errors import UserError
from gptlab.model.gpt import GPT
from gptlab.model.modern import build_gpt
from gptlab.pretrained.nanogpt import import_nanogpt_checkpoint
from gptlab.training.optim.optimizers import build_optimizer

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": 257, "bias": True, "dropout": 0.0}
OWN = ("model=tiny", "model.block_size=32", "model.activation=gelu", "model.vocab_size=257", "train.max_steps=6")


def own(*changes: str) -> tuple[RunConfig, GPT]:
    config = resolved(*OWN, *changes)
    return config, build_gpt(config.model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """nanoGPT checkpoint after three steps."""
    torch.manual_seed(0)
    _, model = own()
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == of] for of in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), lr=3e-3 * 4 / 101)  # learning rate of the next step
    for _ in range(3):
        model.loss(torch.randint(257, (2, 32)), torch.randint(257, (2, 32)), None, None).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {f"_orig_mod.transformer.{name}": t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    whole = {"model": state, "optimizer": optimizer.state_dict(), "model_args": SHAPE, "iter_num": 3}
    whole["config"] = {"batch_size": 4, "gradient_accumulation_steps": 3, "grad_clip": 1.0}
    path = tmp_path_factory.mktemp("nanogpt") / "ckpt.pt"
    torch.save(whole, path)
    return path


@pytest.fixture
def path(tmp_path, saved) -> Path:
    """Copy of the checkpoint, which a test may change."""
    return Path(shutil.copy(saved, tmp_path))


def test_optimizer_state_is_assigned_to_its_parameters(path):
    config, model = own()
    taken = import_nanogpt_checkpoint(path, config, model)
    assert taken["global_step"] == 3
    theirs = torch.load(path, weights_only=True)
    order = [name for name, p in model.named_parameters() if p.dim() > 1]
    order += [name for name, p in model.named_parameters() if p.dim() < 2]
    (state,) = taken["optimizer_states"]
    assert [name for group in state["param_groups"] for name in group["params"]] == order
    for number, name in enumerate(order):
        for key, tensor in theirs["optimizer"]["state"][number].items():
            assert torch.equal(state["state"][name][key], tensor), (name, key)
        assert torch.equal(taken["state_dict"][name], theirs["model"][f"_orig_mod.transformer.{name}"])
    lengths = [len(group["params"]) for group in build_optimizer(model, config.optimizer, fused=False).param_groups]
    assert [len(group["params"]) for group in state["param_groups"]] == lengths


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["optimizer.lr=1e-4"],
            r"the learning rate at step 3 \(optimizer\.lr, schedule, train\.max_steps\) is 0\.00011",
        ),
        (["optimizer.betas=[0.9,0.99]"], r"optimizer\.betas is \(0\.9, 0\.95\) in .* and \(0\.9, 0\.99\) in this run"),
        (
            ["optimizer.weight_decay=0"],
            r"optimizer\.weight_decay is \[0\.1, 0\.0\] .* \[0\.0, 0\.0\] in this run",
        ),
        (["model.pad_vocab_to_multiple_of=64"], r"wte\.weight is \(257, 64\) in .* and \(320, 64\) in this run"),
        (["train.max_steps=3"], r"it is at step 3, but train\.max_steps=3 is not greater"),
        (["optimizer=muon"], r"its optimizer is AdamW, .* optimizer=muon\. Use optimizer=adamw"),
    ],
    ids=lambda part: part[0] if isinstance(part, list) else "",
)
def test_config_key_that_changes_the_next_step_is_reported(path, changes, message):
    with pytest.raises(UserError, match=rf"resume_from_nanogpt=.*ckpt\.pt cannot be resumed exactly: {message}"):
        import_nanogpt_checkpoint(path, *own(*changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.n_head=4"], r"model\.n_head=4, but the weights have 2"),
        (["model.n_layer=1"], r"model\.n_layer=1, but the weights have 2"),
        (["model.n_layer=3"], r"model\.n_layer=3, but the weights have 2"),
        (["model.block_size=16"], r"model\.block_size=16, but it has 32"),
        (["model.n_embd=32"], r"model\.n_embd=32, but the weights have 64"),
        (["model.vocab_size=256"], r"model\.vocab_size=256, but the weights have 257"),
        (["model.bias=false"], r"model\.bias=False, but the weights have True"),
        (["model.tie_weights=false"], r"model\.tie_weights=False, but the weights have True"),
        (["model.activation=gelu_tanh"], r"model\.activation=gelu_tanh, but the weights have gelu"),
        (["model.norm=rms"], r"model\.norm=rms, but the weights have layer"),
        (["model.positions=rotary"], r"model\.positions=rotary, but the weights have learned"),
        (["model.qk_norm=true"], r"model\.qk_norm=True, but the weights have False"),
        (["model.logit_soft_cap=30"], r"model\.logit_soft_cap=30\.0, but the weights have None"),
        (["loss=z_loss"], "this run has a loss of its own"),
        (["train.ema_decay=0.99"], "no averages of the weights"),
        (["data.documents=masked"], r"nanoGPT attends across documents, but data\.documents=masked"),
        (["train.grad_clip=0.5"], r"train\.grad_clip is 1\.0 in the checkpoint and 0\.5 in this run"),
        (["train.global_batch_size=24"], r"train\.global_batch_size is 12 in the checkpoint and 24 in this run"),
    ],
    ids=lambda part: part[0] if isinstance(part, list) else "",
)
def test_another_model_than_that_of_the_checkpoint_is_refused(path, changes, message):
    with pytest.raises(UserError, match=rf"cannot be resumed exactly: .*{message}"):
        import_nanogpt_checkpoint(path, *own(*changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update({"transformer.h.2.ln_1.weight": torch.ones(64)}), r"not have: h\.2\.ln_1\.weight"),
        (
            lambda c: c["model"].update({"lm_head.weight": torch.ones(257, 64)}),
            r"lm_head\.weight and wte\.weight differ",
        ),
        (lambda c: c["model"]["_orig_mod.transformer.ln_f.weight"].fill_(torch.nan), r"ln_f\.weight has values that"),
        (lambda c: c["model_args"].update(rope=True), r"model_args have options that nanoGPT does not have: rope"),
        (
            lambda c: c["model_args"].update(vocab_size=320),
            r"its model_args have vocab_size=320, but wte\.weight has 257",
        ),
    ],
    ids=["a block", "another head", "NaN", "an option", "rows"],
)
def test_what_the_model_does_not_have_is_refused(path, change, message):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=rf"cannot be resumed exactly: .*{message}"):
        import_nanogpt_checkpoint(path, *own())


def _swapped(checkpoint):
    state = checkpoint["optimizer"]["state"]
    state[0], state[1] = state[1], state[0]


def _late(checkpoint):
    checkpoint["optimizer"]["state"][2]["step"] = torch.tensor(2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_swapped, r"the optimizer state of wte\.weight is missing or has the wrong shape"),
        (_late, r"its AdamW has updated h\.0\.attn\.c_attn\.weight 2 times instead of 3"),
        (
            lambda checkpoint: checkpoint.update(optimizer=None),
            r"lacks iter_num or the optimizer state\. .*init_from",
        ),
        (lambda checkpoint: checkpoint.pop("iter_num"), r"lacks iter_num"),
        (
            lambda checkpoint: checkpoint["optimizer"]["param_groups"][0]["params"].pop(),
            "must have two parameter groups",
        ),
    ],
    ids=["swapped", "late", "no optimizer", "no step", "other groups"],
)
def test_invalid_optimizer_state_raises(path, change, message):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=message):
        import_nanogpt_checkpoint(path, *own())
