"""Weights of other programs give the same logits as in those programs, and mismatches are reported."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from canary import Canary
from conftest import tiny_config
from gptlab.errors import UserError
from gptlab.model.gpt import GPT
from gptlab.pretrained.external import check_external
from gptlab.pretrained.weights import load_weights
from gptlab.training.checkpoints.reading import read_plain

SHAPE = {"vocab_size": 97, "n_layer": 3, "n_head": 4, "n_embd": 48, "block_size": 24}
MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # transformers' Conv1D
TOLERANCES = [(torch.float64, 1e-9), (torch.float32, 1e-5)]


def transformers_gpt2(activation: str = "gelu_new", dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {name: SHAPE[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    model = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=24, activation_function=activation))
    for parameter in model.parameters():  # biases and LayerNorms different from 0 and 1, so that they have an effect
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().to(dtype)


def loaded(path: Path, dtype: torch.dtype = torch.float32, **changes) -> GPT:
    """Checks the weights of ``path`` as a command does, and returns a model with them."""
    config = tiny_config(**SHAPE | changes)
    check_external(path, config)
    model = GPT(config).to(dtype)
    load_weights(model, path)
    return model.eval()


@pytest.fixture
def idx() -> torch.Tensor:
    return torch.randint(97, (4, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Directory of a GPT-2 saved by transformers."""
    transformers_gpt2().save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "several files"])
def test_hugging_face_weights_give_the_logits_of_transformers(tmp_path, idx, dtype, tolerance, shards):
    theirs = transformers_gpt2(dtype=dtype)
    theirs.save_pretrained(tmp_path / "gpt2", max_shard_size=40_000 if shards else "1GB")
    assert (tmp_path / "gpt2" / "model.safetensors.index.json").exists() == shards
    torch.testing.assert_close(loaded(tmp_path / "gpt2", dtype)(idx), theirs(idx).logits, atol=tolerance, rtol=0)


def test_names_without_prefix_and_stored_masks_are_accepted(folder, idx):
    state = {
        name.removeprefix("transformer."): t.clone() for name, t in load_file(folder / "model.safetensors").items()
    }
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(3)}
    masks["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state | masks, folder / "model.safetensors")
    torch.testing.assert_close(loaded(folder)(idx), transformers_gpt2()(idx).logits, atol=1e-5, rtol=0)


def test_shorter_block_and_padded_embedding_load_the_weights(folder, idx):
    ours = loaded(folder, block_size=16, pad_vocab_to_multiple_of=64)
    assert ours.wte.weight.shape == (128, 48)
    assert ours.lm_head.weight is ours.wte.weight
    expected = transformers_gpt2()(idx[:, :16]).logits
    torch.testing.assert_close(ours(idx[:, :16]), expected, atol=1e-5, rtol=0)


def nanogpt(
    path: Path, theirs: GPT2LMHeadModel, *, prefix: str = "", bias: bool = True, rows: int = 97, **more
) -> Path:
    """Writes a checkpoint of nanoGPT's train.py, whose GPT has nn.Linear and always stores the head and wte."""
    state = {}
    for name, tensor in theirs.state_dict().items():
        if bias or not name.endswith(".bias"):
            state[prefix + name] = tensor.T.contiguous() if name.endswith(MATRICES) else tensor.clone()
    wte = torch.cat((state[f"{prefix}transformer.wte.weight"], torch.full((rows - 97, 48), 7.0, dtype=theirs.dtype)))
    state[f"{prefix}transformer.wte.weight"] = state[f"{prefix}lm_head.weight"] = wte
    arguments = {**SHAPE, "vocab_size": rows, "bias": bias, "dropout": 0.1}
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3)
    checkpoint = {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "model_args": arguments,
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "dataset": "openwebtext", "compile": True},
    }
    torch.save(checkpoint | more, path)
    return path


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["plain", "compiled"])
@pytest.mark.parametrize(("bias", "rows"), [(True, 97), (False, 128)], ids=["with biases", "without, padded"])
def test_nanogpt_checkpoint_gives_the_logits_of_nanogpt(tmp_path, idx, dtype, tolerance, prefix, bias, rows):
    theirs = transformers_gpt2("gelu", dtype)  # nanoGPT's model except for the biases
    if not bias:
        for name, parameter in theirs.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.zeros_(parameter)
    path = nanogpt(tmp_path / "ckpt.pt", theirs, prefix=prefix, bias=bias, rows=rows)
    ours = loaded(path, dtype, activation="gelu", bias=bias)
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=tolerance, rtol=0)


def test_longer_block_of_nanogpt_is_truncated(tmp_path, idx):
    theirs = transformers_gpt2("gelu")
    ours = loaded(nanogpt(tmp_path / "ckpt.pt", theirs), activation="gelu", block_size=8)
    torch.testing.assert_close(ours(idx[:, :8]), theirs(idx[:, :8]).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 2}, r"model\.n_layer=2, but the weights have 3"),
        ({"vocab_size": 61}, r"model\.vocab_size=61, but the weights have 97"),
        ({"vocab_size": 98}, r"model\.vocab_size=98, but the weights have 97"),
        ({"block_size": 25}, r"model\.block_size=25, but the weights have 24"),
        ({"bias": False}, r"model\.bias=False, but the weights have True"),
        ({"tie_weights": False}, r"model\.tie_weights=False, but the weights have True"),
        ({"activation": "gelu"}, r"model\.activation=gelu, but the weights have gelu_tanh"),
    ],
)
def test_other_model_is_reported_from_config_json(folder, changes, message):
    with pytest.raises(UserError, match=rf"The weights of .*gpt2 do not fit this model: {message}\."):
        check_external(folder, tiny_config(**SHAPE | changes))


def test_unknown_vocabulary_size_is_not_compared(folder):
    check_external(folder, tiny_config(**SHAPE | {"vocab_size": None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 64}, r"model\.n_embd=64, but the weights have 48"),
        ({"activation": "gelu_tanh"}, r"model\.activation=gelu_tanh, but the weights have gelu"),
        ({"vocab_size": 60}, r"model\.vocab_size=60, but the weights have 97"),
    ],
)
def test_other_model_is_reported_from_model_args(tmp_path, changes, message):
    path = nanogpt(tmp_path / "ckpt.pt", transformers_gpt2("gelu"))
    with pytest.raises(UserError, match=rf"The weights of .*ckpt\.pt do not fit this model: {message}"):
        loaded(path, **{"activation": "gelu"} | changes)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model": None}, "its key 'model' must map names to tensors"),
        ({"model": {"wte": 3}}, "its key 'model' must map names to tensors"),
        ({"model_args": None}, r"model_args of .*ckpt\.pt has vocab_size=None, n_layer=None"),
        ({"model": {"transformer.wte.weight": torch.zeros(97, 48)}}, r"missing parameters: h\.0\.attn\.c_attn\.bias"),
    ],
)
def test_incomplete_nanogpt_checkpoint_is_reported(tmp_path, more, message):
    path = nanogpt(tmp_path / "ckpt.pt", transformers_gpt2("gelu"), **more)
    with pytest.raises(UserError, match=message):
        loaded(path, activation="gelu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, r"config\.json has model_type=llama, but gptlab only supports gpt2"),
        ({"layer_norm_epsilon": 1e-6}, r"config\.json has layer_norm_epsilon=1e-06, which gptlab does not support"),
        ({"n_inner": 100}, r"has n_inner=100"),
        ({"activation_function": "relu"}, r"has activation_function=relu"),
        ({"scale_attn_by_inverse_layer_idx": True}, r"has scale_attn_by_inverse_layer_idx=True"),
        ({"n_layer": "three"}, r"config\.json has n_layer='three', which should be an integer greater than 0"),
        *(({"n_layer": size}, rf"has n_layer={size}, which should be an integer") for size in (0, -1, 2.0, True, None)),
        ({"n_positions": 0, "n_head": 0}, r"has n_head=0, n_positions=0, which should be an integer greater than 0"),
        ({"n_head": 5}, r"config\.json has n_head=5, which does not divide n_embd=48"),
        ({"tie_word_embeddings": "false"}, r"has tie_word_embeddings='false', which should be true or false"),
        ({"tie_word_embeddings": None}, r"has tie_word_embeddings=None, which should be true or false"),
    ],
)
def test_unsupported_config_json_raises(folder, changes, message):
    edit(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        check_external(folder, tiny_config(**SHAPE))


@pytest.mark.parametrize(("name", "size"), [("n_positions", 8), ("vocab_size", 90)])
def test_more_rows_than_in_config_json_raise(folder, name, size):
    edit(folder / "config.json", **{name: size})
    key = "block_size" if name == "n_positions" else name
    with pytest.raises(UserError, match=rf"w[tp]e\.weight has \d+ rows, but the model has {key}={size}"):
        loaded(folder, **{key: size})


def test_n_inner_of_four_times_n_embd_is_accepted(folder):
    edit(folder / "config.json", n_inner=4 * 48)
    check_external(folder, tiny_config(**SHAPE))


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    state = load_file(folder / "model.safetensors")
    changed = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    state = {name: tensor for name, tensor in (state | changed).items() if tensor is not None}
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"transformer__ln_f__weight": None}, r"missing parameters: ln_f\.weight"),
        ({"transformer__extra": torch.zeros(1)}, r"unknown parameters: extra"),
        ({"transformer__ln_f__weight": torch.ones(49)}, r"ln_f\.weight is \(49,\) of torch\.float32, expected \(48,\)"),
        (
            {"transformer__wpe__weight": torch.zeros(23, 48)},
            r"wpe\.weight is \(23, 48\) of torch\.float32, expected \(24, 48\)",
        ),
        ({"transformer__wte__weight": torch.zeros(())}, r"wte\.weight is \(\) of torch\.float32, expected \(97, 48\)"),
        ({"transformer__ln_f__bias": torch.ones(48).to(torch.int8)}, r"ln_f\.bias is \(48,\) of torch\.int8"),
        (
            {"lm_head__weight": torch.zeros(97, 48)},
            r"lm_head\.weight and wte\.weight differ, but model\.tie_weights=true",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_reported(folder, tensors, message):
    change(folder, **tensors)
    with pytest.raises(UserError, match=rf"The weights of .* do not fit this model: {message}"):
        loaded(folder)


def test_truncated_safetensors_file_is_reported(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors is not a complete safetensors file"):
        check_external(folder, tiny_config(**SHAPE))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": "../other.safetensors"}, "must list files in the same directory"),
        ({"a": "/etc/passwd"}, "must list files in the same directory"),
        ({"a": 3}, "must list files in the same directory"),
        ({}, "must list files in the same directory"),
        ({"a": "model-00001-of-00002.safetensors"}, r"lacks model-00001-of-00002\.safetensors, which"),
    ],
)
def test_index_must_list_files_in_its_directory(folder, table, message):
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(UserError, match=message):
        check_external(folder, tiny_config(**SHAPE))


def test_missing_weights_and_missing_config_raise(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        check_external(folder, tiny_config(**SHAPE))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        check_external(folder, tiny_config(**SHAPE))


@pytest.fixture
def canary(tmp_path):
    return Canary(tmp_path / "canary")


@pytest.mark.parametrize("kind", ["bare", "archive"])
def test_payload_in_a_checkpoint_is_not_run(tmp_path, canary, kind):
    path = canary.write(tmp_path / "state.pt", kind)
    with pytest.raises(UserError, match=r"state\.pt (was not loaded|cannot be read)") as error:
        read_plain(path)
    assert "weights_only" not in str(error.value)  # torch's message explains how to run it
    assert not canary.was_run()


@pytest.mark.parametrize("kind", ["bare", "archive"])
def test_payload_in_a_nanogpt_checkpoint_is_not_run(tmp_path, canary, kind):
    path = canary.write(tmp_path / "ckpt.pt", kind)
    with pytest.raises(UserError, match=r"ckpt\.pt (was not loaded|is not a nanoGPT checkpoint)"):
        loaded(path)
    assert not canary.was_run()


@pytest.mark.parametrize("kind", ["bare", "archive"])
def test_directory_with_only_a_pickle_raises(folder, canary, kind):
    (folder / "model.safetensors").unlink()
    canary.write(folder / "pytorch_model.bin", kind)
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle, .* convert it to safetensors"):
        loaded(folder)
    assert not canary.was_run()


@pytest.mark.parametrize("kind", ["bare", "archive"])
def test_payload_named_safetensors_is_not_run(folder, canary, kind):
    canary.write(folder / "model.safetensors", kind)
    with pytest.raises(UserError, match=r"model\.safetensors is not a complete safetensors file"):
        loaded(folder)
    with pytest.raises(UserError, match=r"model\.safetensors is not a complete safetensors file"):
        load_weights(GPT(tiny_config(**SHAPE)), folder)  # without prior checks
    assert not canary.was_run()
