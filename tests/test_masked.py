"""data.documents=masked, end to end."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from commands import assert_success, metrics, weights
from gptlab.data.order import evaluation_starts
from gptlab.model.config import GPTConfig
from gptlab.model.gpt import GPT

MASKED = ("data.source=docs.jsonl", "data.column=text", "data.documents=masked")
END = 256


@pytest.fixture
def author(user):
    """User with documents of 5 to 60 bytes."""
    texts = [f"{n}: the {['cat', 'dog'][n % 2]} has " + "a fish and " * (n % 5) for n in range(800)]
    (user.folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return user


def evaluated(user, directory, *, cut: bool) -> float:
    """Returns the mean loss over the evaluation windows.

    With ``cut``, each window is split at its end-of-text tokens, and the model reads each part separately.
    """
    (folder,) = (path for path in (user.folder / "cache").glob("*-*") if path.is_dir())
    val = np.concatenate([np.fromfile(path, "<u2") for path in sorted(folder.glob("val_*.bin"))]).astype(np.int64)
    model = GPT(GPTConfig(**yaml.safe_load((directory / "config.yaml").read_text())["model"])).eval()
    model.load_state_dict(weights(directory))
    losses = []
    for start in evaluation_starts(len(val), 32, 10).tolist():
        window = val[start : start + 33]
        cuts = [0, *(position for position in range(1, 32) if cut and window[position] == END), 32]
        for begin, stop in pairwise(cuts):
            with torch.no_grad():
                logits = model(torch.tensor(window[None, begin:stop]))[0]
            losses += F.cross_entropy(logits, torch.tensor(window[begin + 1 : stop + 1]), reduction="none").tolist()
    assert len(losses) == 320
    return sum(losses) / len(losses)


@pytest.mark.slow
def test_masked_documents_have_the_loss_of_separate_documents(author):
    assert_success(author.train(*MASKED))
    run = author.only_run()
    assert metrics(run, "val/loss")[6] == pytest.approx(evaluated(author, run, cut=True), abs=2e-6)
    assert abs(evaluated(author, run, cut=False) - evaluated(author, run, cut=True)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp_tp"])
def test_masked_documents_have_the_same_losses_on_two_devices(author, strategy):
    assert_success(author.train("name=one", *MASKED))
    assert_success(
        author.train("name=two", *MASKED, f"trainer={strategy}", "trainer.devices=2", "train.micro_batch_size=2")
    )
    one, two = (author.only_run(name) for name in ("one", "two"))
    for name in ("train/loss", "val/loss"):
        assert metrics(two, name) == pytest.approx(metrics(one, name), abs=1e-5), name


def test_masking_without_an_end_of_text_token_is_an_error(author):
    done = author.train(*MASKED, "tokenizer=characters")
    assert done.returncode == 2
    assert "data.documents=masked: tokenizer=characters has no end-of-text token" in done.stderr
    assert "Traceback" not in done.stderr
