"""The average of the weights, end to end: what is evaluated, sampled and loaded is the average, and nothing else is."""

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
    """Mean over all windows of 32 of the last tenth of the text, a byte a token."""
    text = (user.folder / "text.txt").read_text()
    tokens = torch.tensor([*text[int(len(text) * 0.9) :].encode(), 256])
    windows = tokens[: (len(tokens) - 1) // 32 * 32 + 1].unfold(0, 33, 32)
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).item()


def sample(directory, model: GPT, step: int) -> str:
    """What a model writes after a step, with the seed of that step."""
    config = yaml.safe_load((directory / "config.yaml").read_text())
    wanted = config["callbacks"]["samples"]
    rows = generate(
        model,
        [[*b"line"]],
        SamplingConfig(
            temperature=wanted["temperature"], top_k=wanted["top_k"], top_p=None, min_p=None, repetition_penalty=1
        ),
        seeds=row_seeds(derive_seed(config["seed"], step), 1),
        max_new_tokens=30,
        decoder=plain_decoder(model),
        device=torch.device("cpu"),
    )
    (text,) = collect_tokens(rows).tolist()
    return f"--- sample 1 ---\nline{bytes(min(token, 255) for token in text).decode(errors='replace')}\n"


@pytest.mark.slow
def test_the_average_is_evaluated_sampled_and_loaded(user):
    every = ("callbacks.checkpoint.every=1", "callbacks.checkpoint.keep_last=9")
    assert_success(user.train(*EMA, *every, *SAMPLES, "train.eval_windows=null"))
    directory = user.only_run()
    places = sorted(directory.glob("checkpoints/*"))
    steps = [torch.load(place / "state.pt", weights_only=True)["state_dict"] for place in places]
    decays = [0, 2 / 11, 3 / 12, 0.3, 0.3, 0.3]  # TensorFlow's warm-up, as far as it is less than 0.3
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
    assert json.loads((places[5] / "record.json").read_text())["facts"]["val_loss"] == evaluated[6]  # the best
    model = load_model(open_model_source(str(directory)))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, found[name]), name
    written = (directory / "samples" / "step_000006.txt").read_text(encoding="utf-8")
    assert written == sample(directory, model_of(directory, found), 6)
    assert written != sample(directory, model_of(directory, steps[5]), 6)


@pytest.mark.slow
def test_a_run_keeps_an_average_to_its_end_or_not_at_all(user, halted):
    changed = ("train.ema_decay=0.9", "train.max_steps=9")
    done = user.python("gptlab.train", f"resume={halted}", *changed)
    assert_config_error(done, "train.ema_decay cannot change when a run is resumed")
    done = user.python("gptlab.train", f"resume={halted}", *changed, "force_resume=true")
    assert_config_error(done, "Averaging of the weights (train.ema_decay) can be neither enabled nor disabled")
    assert list(metrics(halted, "val/loss")) == [3, 6]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "two groups of two"])
def test_on_several_devices_it_is_the_average_of_one(user, runs, layout):
    same = (*EMA, "trainer.precision=32-true", "optimizer.eps=1e-3")  # beside which the gradients' rounding is small
    one = runs.give(user, "averaged", *same)
    assert_success(user.train("name=spread", *same, *LAYOUTS[layout], timeout=600))
    spread = user.only_run("spread")
    for name in ("train/loss", "val/loss"):
        assert metrics(spread, name) == pytest.approx(metrics(one, name), abs=1e-5), name
    found, expected = averages(spread), averages(one)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0, msg=name)
    model = load_model(open_model_source(str(spread)))
    assert all(torch.equal(parameter, found[name]) for name, parameter in model.named_parameters())


@pytest.mark.slow
def test_its_promises_are_proved(user):
    few = ("prove.ranks=[1]", "prove.workers=[0]", "prove.steps=4", "prove.kill_after=2")
    tiny = ("data=text", "data.source=text.txt", "model=tiny", "model.block_size=32")
    assert_success(user.python("gptlab.prove", *tiny, *few, "train.ema_decay=0.9", timeout=900))
    (folder,) = (user.folder / "outputs" / "prove").iterdir()
    proofs = {proof["name"]: proof for proof in json.loads((folder / "prove.json").read_text())["proofs"]}
    assert proofs["killed and resumed"]["passed"] is True
    assert proofs["checkpoint round trip"]["details"]["tensors"] == 5 * 28  # a weight, its moments, step and average
