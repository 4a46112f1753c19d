"""Training from the weights and the data of other programs, end to end."""

import pickle

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from commands import assert_config_error, assert_success, metrics, weights
from gptlab.exit_codes import CONFIG_ERROR
from gptlab.model.gpt import GPT
from gptlab.pretrained.source import open_model_source
from gptlab.pretrained.weights import load_model
from reference_training import plain_training

UNCHANGED = ("optimizer.lr=1e-30", "train.max_steps=1", "callbacks=checkpoint")  # leaves the weights unchanged


@pytest.fixture
def gpt2(user) -> GPT2LMHeadModel:
    """GPT-2 with the shape of model=tiny for bytes and a longer block, saved by transformers."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=40, n_embd=64, n_layer=2, n_head=2))
    model.save_pretrained(user.folder / "gpt2")
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [("trainer=cpu",), ("trainer=ddp", "trainer.devices=2")], ids=["one", "two"])
def test_a_run_starts_from_hugging_face_weights(user, gpt2, devices):
    assert_success(user.train("init_from=gpt2", *UNCHANGED, *devices))
    directory = user.only_run()
    idx = torch.arange(32)[None] * 8
    torch.testing.assert_close(load_model(open_model_source(str(directory)))(idx), gpt2(idx).logits, atol=1e-5, rtol=0)
    (user.folder / "gpt2").rename(user.folder / "elsewhere")
    assert_success(user.python("gptlab.train", f"resume={directory}", "train.max_steps=2"))  # it has its own checkpoint


def test_weights_for_another_vocabulary_are_an_error_before_anything_is_written(user, gpt2):
    (user.folder / "text.txt").write_text("abc" * 1000)
    done = user.train("init_from=gpt2", "tokenizer=characters")
    assert "gpt2 do not fit this model: model.vocab_size=3, but the weights have 257." in done.stderr
    assert done.returncode == CONFIG_ERROR
    assert not (user.folder / "outputs").exists()


@pytest.mark.slow
def test_training_and_sampling_use_nanogpts_character_data(user):
    text = (user.folder / "text.txt").read_text()
    characters = sorted(set(text))
    ids = {character: i for i, character in enumerate(characters)}
    folder = user.folder / "char"
    folder.mkdir()
    for split, part in (("train", text[:-5000]), ("val", text[-5000:])):
        np.array([ids[character] for character in part], dtype=np.uint16).tofile(folder / f"{split}.bin")
    meta = {"vocab_size": len(ids), "itos": dict(enumerate(characters)), "stoi": ids}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert_success(user.train("data=shards", "data.source=null", "data.path=char", "tokenizer=characters"))
    folder.rename(user.folder / "elsewhere")  # the run stores its vocabulary
    done = user.python("gptlab.sample", f"run={user.only_run()}", "prompt=line", "max_new_tokens=20")
    assert_success(done)
    assert set(done.stdout.partition("---")[0]) <= set(characters)


SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": 257, "bias": True, "dropout": 0.0}
AS_IN_NANOGPT = ("model.activation=gelu", "optimizer.weight_decay=0.1", "name=resumed", "callbacks=checkpoint")


def nanogpt_run(user, directory, path) -> GPT:
    """Trains six steps as nanoGPT does, and saves nanoGPT's checkpoint after three."""

    def save(step: int, model: GPT, optimizer: torch.optim.AdamW) -> None:
        if step == 3:
            state = {f"transformer.{name}": t for name, t in model.state_dict().items() if name != "lm_head.weight"}
            state["lm_head.weight"] = model.wte.weight
            whole = {"model": state, "optimizer": optimizer.state_dict(), "model_args": SHAPE, "iter_num": step}
            torch.save(whole | {"best_val_loss": torch.tensor(3.0), "config": {}}, path)

    _, model = plain_training(user, directory, 6, save, activation="gelu")
    return model


@pytest.mark.slow
def test_a_resumed_nanogpt_run_has_the_weights_of_an_uninterrupted_one(user, runs):
    torch.set_num_threads(1)
    path = user.folder / "ckpt.pt"
    model = nanogpt_run(user, runs.give(user, "first"), path)
    assert_success(user.train(f"resume_from_nanogpt={path}", *AS_IN_NANOGPT))
    directory = user.only_run("resumed")
    assert list(metrics(directory, "train/loss")) == [4, 5, 6]
    for name, tensor in weights(directory).items():
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=1e-5, rtol=0, msg=name)
    again = user.train(f"resume_from_nanogpt={path}", *AS_IN_NANOGPT, "name=again", "optimizer.lr=1e-4")
    assert_config_error(again, f"resume_from_nanogpt={path} cannot be resumed exactly: the learning rate at step 3")
    assert not (user.folder / "outputs" / "again").exists()
    path.rename(user.folder / "elsewhere")
    assert_success(user.python("gptlab.train", f"resume={directory}", "train.max_steps=7"))  # from its own checkpoint
    assert list(metrics(directory, "train/loss")) == [4, 5, 6, 7]
