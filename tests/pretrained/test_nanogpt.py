"""A checkpoint of nanoGPT goes on exactly, or what is in the way is said; tests/test_init_from.py goes on with one."""

from pathlib import Path

import pytest
import torch

from configs import resolved
from gptlab.config.schema import RunConfig
from gptlab.errors import UserError
from gptlab.model.gpt import GPT
from gptlab.pretrained.nanogpt import import_nanogpt_checkpoint
from gptlab.training.optim.optimizers import build_optimizer

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": 257, "bias": True, "dropout": 0.0}
OWN = ("model=tiny", "model.block_size=32", "model.activation=gelu", "model.vocab_size=257", "train.max_steps=6")


def own(*changes: str) -> tuple[RunConfig, GPT]:
    config = resolved(*OWN, *changes)
    return config, GPT(config.model)


@pytest.fixture
def path(tmp_path) -> Path:
    """What nanoGPT saves after three steps."""
    torch.manual_seed(0)
    _, model = own()
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == of] for of in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), lr=3e-3 * 4 / 101)  # the rate of the step that comes
    for _ in range(3):
        model.loss(torch.randint(257, (2, 32)), torch.randint(257, (2, 32)), None, None).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {f"_orig_mod.transformer.{name}": t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    whole = {"model": state, "optimizer": optimizer.state_dict(), "model_args": SHAPE, "iter_num": 3, "config": {}}
    torch.save(whole, tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt"


def test_every_moment_is_its_parameter_s(path):
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
    ("changes", "sentence"),
    [
        (
            ["optimizer.lr=1e-4"],
            r"the learning rate at step 3 \(optimizer\.lr, schedule, train\.max_steps\) is 0\.00011",
        ),
        (["optimizer.betas=[0.9,0.99]"], r"optimizer\.betas is \(0\.9, 0\.95\) there and \(0\.9, 0\.99\) here"),
        (["optimizer.weight_decay=0"], r"optimizer\.weight_decay is \[0\.1, 0\.0\] there and \[0\.0, 0\.0\] here"),
        (["model.pad_vocab_to_multiple_of=64"], r"wte\.weight is \(257, 64\) there and \(320, 64\) here"),
        (["train.max_steps=3"], r"it has made 3 steps, and train\.max_steps=3 is not beyond"),
        (["optimizer=muon"], "its optimizer is AdamW, and this run's is muon: optimizer=adamw"),
    ],
    ids=lambda part: part[0] if isinstance(part, list) else "",
)
def test_a_setting_that_would_make_another_step_of_it_is_named(path, changes, sentence):
    with pytest.raises(UserError, match=rf"resume_from_nanogpt=.*ckpt\.pt cannot go on exactly: {sentence}"):
        import_nanogpt_checkpoint(path, *own(*changes))


def _exchanged(checkpoint):
    state = checkpoint["optimizer"]["state"]
    state[0], state[1] = state[1], state[0]


def _late(checkpoint):
    checkpoint["optimizer"]["state"][2]["step"] = torch.tensor(2.0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_exchanged, r"the moments of wte\.weight are not there, or are another parameter's"),
        (_late, r"its AdamW has updated h\.0\.attn\.c_attn\.weight 2 times, not 3"),
        (
            lambda checkpoint: checkpoint.update(optimizer=None),
            r"no state of its optimizer\. Its weights alone: init_from=",
        ),
        (lambda checkpoint: checkpoint.pop("iter_num"), r"it has no iter_num"),
        (
            lambda checkpoint: checkpoint["optimizer"]["param_groups"][0]["params"].pop(),
            "its optimizer has other groups than matrices and vectors",
        ),
    ],
    ids=["exchanged", "late", "no optimizer", "no step", "other groups"],
)
def test_moments_that_are_not_those_of_the_step_are_refused(path, change, sentence):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=sentence):
        import_nanogpt_checkpoint(path, *own())
