"""The moving average of the weights (train.ema_decay), end to end: it is evaluated, sampled and loaded."""

import json

import pytest
import torch
import torch.nn.functional as F
import yaml

from commands import assert_config_error, assert_success, averages, metrics
from gptlab.model.config import GPTConfig, SamplingConfig
from gptlab.model.generation.generate import collect_tokens, generate, plain_decoder
from gptlab.model.generation.sampler import row_seeds
from gptlab.model.gpt import GPT
from gptlab.pretrained.source import open_model_source
from gptlab.pretrained.weights import load_model
from gptlab.training.module import derive_seed
from test_distributed import LAYOUTS

EMA = ("train.ema_decay=0.3", "schedule=constant", "schedule.warmup_steps=0")
SAMPLES = ("callbacks.samples.prompt=line", "callbacks.samples.max_new_tokens=30", "callbacks.samples.num_samples=1")


def model_of(directory, weights: dict[str, torch.Tensor]) -> GPT:
    model = GPT(GPTConfig(**yaml.safe_load((directory / "config.yaml").read_text())["model"]))
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    return model.eval()


@torch.no_grad()
def val_loss(user, model: GPT) -> float:
    """Returns the mean loss over all windows of 32 bytes in the last tenth of the text."""
    text = (user.folder / "text.txt").read_text()
    tokens = torch.tensor([*text[int(len(text) * 0.9) :].encode(), 256])
    windows = tokens[: (len(tokens) - 1) // 32 * 32 + 1].unfold(0, 33, 32)
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).item()


def sample(directory, model: GPT, step: int) -> str:
    """Returns the sample of a model after a step, generated with the seed of that step."""
    config = yaml.safe_load((directory / "config.yaml").read_text())
    settings = config["callbacks"]["samples"]
    rows = generate(
        model,
        [[*b"line"]],
        SamplingConfig(
            temperature=settings["temperature"], top_k=settings["top_k"], top_p=None, min_p=None, repetition_penalty=1
        ),
        seeds=row_seeds(derive_seed(config["seed"], step), 1),
        max_new_tokens=30,
        decoder=plain_decoder(model),
        device=torch.device("cpu"),
    )
    (text,) = collect_tokens(rows)
    return f"--- sample 1 ---\nline{bytes(min(token, 255) for token in text).decode(errors='replace')}\n"


@pytest.mark.slow
def test_the_average_is_evaluated_sampled_and_loaded(user):
    every = ("callbacks.checkpoint.every=1", "callbacks.checkpoint.keep_last=9")
    assert_success(user.train(*EMA, *every, *SAMPLES, "train.eval_windows=null"))
    directory = user.only_run()
    checkpoints = sorted(directory.glob("checkpoints/*"))
    steps = [torch.load(checkpoint / "state.pt", weights_only=True)["state_dict"] for checkpoint in checkpoints]
    decays = [0, 2 / 11, 3 / 12, 0.3, 0.3, 0.3]  # TensorFlow's warm-up, at most 0.3
    expected = {name: tensor.double() for name, tensor in steps[0].items()}
    losses = []
    for decay, weights in zip(decays, steps, strict=True):
        for name, tensor in weights.items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
        losses.append(val_loss(user, model_of(directory, expected)))
    found = averages(directory)
    assert found.keys() == expected.keys() - {"lm_head.weight"}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], atol=1e-6, rtol=0, msg=name)
    evaluated = metrics(directory, "val/loss")
    assert evaluated == pytest.approx({step: losses[step - 1] for step in (3, 6)}, abs=2e-6)
    assert abs(evaluated[6] - val_loss(user, model_of(directory, steps[5]))) > 1e-3
    facts = json.loads((checkpoints[5] / "record.json").read_text())["facts"]
    assert facts["val_loss"] == evaluated[6]  # selects the best checkpoint
    model = load_model(open_model_source(str(directory)))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, found[name]), name
    written = (directory / "samples" / "step_000006.txt").read_text(encoding="utf-8")
    assert written == sample(directory, model_of(directory, found), 6)
    assert written != sample(directory, model_of(directory, steps[5]), 6)


@pytest.mark.slow
def test_averaging_cannot_be_enabled_when_a_run_is_resumed(user, halted):
    changed = ("train.ema_decay=0.9", "train.max_steps=9")
    done = user.python("gptlab.train", f"resume={halted}", *changed)
    assert_config_error(done, "train.ema_decay cannot change when a run is resumed")
    done = user.python("gptlab.train", f"resume={halted}", *changed, "force_resume=true")
    assert_config_error(done, "Averaging of the weights (train.ema_decay) can be neither enabled nor disabled")
    assert list(metrics(halted, "val/loss")) == [3, 6]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "fsdp_tp, 2 x 2"])
def test_the_average_on_several_devices_is_that_of_one(user, runs, layout):
    same = (*EMA, "trainer.precision=32-true", "optimizer.eps=1e-3")  # a large epsilon hides rounding of gradients
    one = runs.give(user, "averaged", *same)
    assert_success(user.train("name=distributed", *same, *LAYOUTS[layout], timeout=600))
    distributed = user.only_run("distributed")
    for name in ("train/loss", "val/loss"):
        assert metrics(distributed, name) == pytest.approx(metrics(one, name), abs=1e-5), name
    found, expected = averages(distributed), averages(one)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0, msg=name)
    model = load_model(open_model_source(str(distributed)))
    assert all(torch.equal(parameter, found[name]) for name, parameter in model.named_parameters())


@pytest.mark.slow
def test_proofs_pass_with_an_average(user):
    few = ("prove.ranks=[1]", "prove.workers=[0]", "prove.steps=4", "prove.kill_after=2")
    tiny = ("data=text", "data.source=text.txt", "model=tiny", "model.block_size=32")
    assert_success(user.python("gptlab.prove", *tiny, *few, "train.ema_decay=0.9", timeout=900))
    (folder,) = (user.folder / "outputs" / "prove").iterdir()
    proofs = {proof["name"]: proof for proof in json.loads((folder / "prove.json").read_text())["proofs"]}
    assert proofs["killed and resumed"]["passed"] is True
    # a weight, its two moments, step count and average
    assert proofs["checkpoint round trip"]["details"]["tensors"] == 5 * 28
