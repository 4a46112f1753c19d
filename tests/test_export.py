"""The export command, end to end, and its peak memory."""

import json
import re
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from commands import assert_success
from gptlab.data.tokenizers.external import to_huggingface
from gptlab.data.tokenizers.tokenizer import BytesTokenizer
from gptlab.errors import UserError
from gptlab.exit_codes import CONFIG_ERROR, DONE, FAILED
from gptlab.export import main
from gptlab.exporters import llmc
from gptlab.exporters.folder import push

VALUES = {"run": "gpt2", "out": "out", "dtype": "float32", "push": None, "dry_run": True, "overwrite": False}
END = {"bos_token_id": 256, "eos_token_id": 256}


@pytest.fixture
def folder(user):
    """GPT-2 for bytes, saved by transformers."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, **END)).save_pretrained(user.folder / "gpt2")
    for name, values in to_huggingface(BytesTokenizer(), 32).items():
        (user.folder / "gpt2" / name).write_text(json.dumps(values))
    return user.folder / "gpt2"


def export(user, *arguments):
    return user.python("gptlab.export", "run=gpt2", "out=out", *arguments)


def test_an_export_prints_its_comparisons_and_the_upload_of_a_dry_run(user, folder):
    user.environment |= {"HF_TOKEN": "hf_secret"}
    done = export(user, "format=gguf", "push=me/model")
    assert_success(done)
    assert re.search(
        r"log-probabilities of the top 257 tokens by llama\.cpp of .*: largest difference .* tolerance", done.stdout
    )
    assert "16 of 16 tokens identical" in done.stdout
    size = (user.folder / "out" / "model.gguf").stat().st_size
    assert f"{size:,} bytes  model.gguf\n" in done.stdout
    assert "Not uploaded, because dry_run=true. Upload it with: hf upload me/model out" in done.stdout
    assert "hf_secret" not in done.stdout + done.stderr
    assert {path.name for path in (user.folder / "out").iterdir()} == {"model.gguf", "README.md", "certificate.json"}


def test_an_export_that_differs_from_its_model_fails_and_writes_nothing(user, folder, monkeypatch, capsys):
    write = llmc.write

    def tampered(model, job, folder):
        write(model, job, folder)
        with (folder / "model.bin").open("r+b") as file:
            file.seek(1024)
            file.write(b"1234")

    monkeypatch.setattr(llmc, "write", tampered)
    monkeypatch.chdir(user.folder)
    assert main.__wrapped__(OmegaConf.create({**VALUES, "format": "llmc"})) == FAILED
    errors = capsys.readouterr().err
    assert "gptlab: out was not written, because the export differs from gpt2: tensors by numpy" in errors
    assert "27 of 28 bit-identical, but not transformer.wte.weight" in errors
    assert not [path for path in user.folder.iterdir() if "out" in path.name]


CONFIG_ERRORS = {
    "an option": (["format=nanogpt"], "format=nanogpt does not support model.activation=gelu_tanh"),
    "pushed": (
        ["format=onnx", "push=me/model"],
        "push requires format=hf or format=gguf",
    ),
    "there already": (["format=hf", "out=gpt2"], "out=gpt2 already exists"),
}


def test_errors_are_found_before_torch_is_imported(folder, without_torch):
    for arguments, message in CONFIG_ERRORS.values():
        done = export(without_torch, *arguments)
        assert (done.returncode, message in done.stderr) == (CONFIG_ERROR, True), done.stderr
        assert not (without_torch.folder / "out").exists()


class Hub:
    """Stand-in for huggingface_hub's HfApi."""

    calls: ClassVar[list] = []

    def create_repo(self, repository, **settings):
        self.calls.append(("create", repository, settings))
        return f"https://hub/{repository}"

    def upload_folder(self, **settings):
        self.calls.append(("upload", settings["repo_id"], settings["folder_path"]))


def test_push_uploads_the_export_to_a_repository(user, folder, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.chdir(user.folder)
    assert main.__wrapped__(OmegaConf.create({**VALUES, "format": "hf", "push": "me/model", "dry_run": False})) == DONE
    assert "Uploaded: https://hub/me/model\n" in capsys.readouterr().out
    assert Hub.calls == [("create", "me/model", {"exist_ok": True}), ("upload", "me/model", Path("out"))]


def test_a_failed_upload_prints_how_to_upload_later(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(UserError, match=r"push=me/model failed: no route to host\nUpload it later with: hf auth login"):
        push(tmp_path, "me/model")


@pytest.fixture(scope="session")
def gpt2_124m(tmp_path_factory):
    """GPT-2 124M with random weights, saved by transformers."""
    folder = tmp_path_factory.mktemp("gpt2")
    with torch.device("meta"):
        names = {name: tensor.shape for name, tensor in GPT2LMHeadModel(GPT2Config()).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.empty(shape).normal_(std=0.02, generator=generator) for name, shape in names.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


MEASURED_IN = [*((form, "float32") for form in ("hf", "nanogpt", "llmc", "gguf", "onnx")), ("hf", "bfloat16")]
LIBRARIES = {
    "hf": "transformers.models.gpt2.modeling_gpt2, transformers.generation.utils, transformers.models.auto",
    "nanogpt": "tiktoken_ext.openai_public",
    "llmc": "tiktoken_ext.openai_public",
    "gguf": "gguf, xllamacpp",
    "onnx": "onnx, onnxscript.optimizer, onnxruntime, torch.onnx._internal.exporter._core",
}
MEASURED = """
import json, sys, time
from pathlib import Path
import {libraries}
import torch, gptlab.exporters.exporter as running
from gptlab.pretrained.source import open_model_source
from gptlab.training.devices import peak_memory

source, form, dtype = sys.argv[1:]
imports, begun = peak_memory(torch.device("cpu")), time.time()
running.export_model(open_model_source(source), form, dtype, Path("out"))
print(json.dumps([imports, peak_memory(torch.device("cpu")), time.time() - begun]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("form", "dtype"), MEASURED_IN)
def test_exporting_gpt2_124m_needs_about_twice_the_memory_of_its_weights(user, gpt2_124m, form, dtype, record_property):
    config = GPT2Config(
        activation_function="gelu" if form == "nanogpt" else "gelu_new", architectures=["GPT2LMHeadModel"]
    )
    config.save_pretrained(gpt2_124m)
    script = MEASURED.format(libraries=LIBRARIES[form])
    done = user.run(sys.executable, "-c", script, str(gpt2_124m), form, dtype, timeout=300)
    assert_success(done)
    imports, peak, seconds = json.loads(done.stdout.splitlines()[-1])
    size = (gpt2_124m / "model.safetensors").stat().st_size
    ratio = (peak - imports) / size
    summary = f"{form} {dtype}: {peak / 1e6:.0f} MB, imports + {ratio:.2f} x the weights, {seconds:.1f} s"
    record_property("measured", summary)
    print(summary)
    assert peak - imports <= 2.2 * size, summary
