"""README.md of an export: a model card for the Hugging Face Hub, with the certificate. Imports no torch."""

import logging
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from gptlab.data.shards.manifest import load_manifest
from gptlab.exporters.formats import FormatName
from gptlab.model.config import parameter_count
from gptlab.pretrained.source import ModelSource
from gptlab.tracking.run_directory import load_config, weights_checkpoint
from gptlab.tracking.run_store.runs import METRICS, Run
from gptlab.training.checkpoints.records import read_record

if TYPE_CHECKING:
    from gptlab.exporters.certificate import Certificate
    from gptlab.exporters.request import ExportRequest

log = logging.getLogger(__name__)


class ModelCardInfo(NamedTuple):
    """Training of a run up to the exported checkpoint, for the model card.

    All attributes are None for a model that gptlab did not train.

    Attributes:
        dataset: Name of the training data, without the path on this machine.
        step: Step of the checkpoint.
        tokens: Number of training tokens up to that step.
        val_loss: Validation loss at that step, in nats per token.
        bits_per_byte: Validation loss at that step, in bits per byte.
    """

    dataset: str | None = None
    step: int | None = None
    tokens: int | None = None
    val_loss: float | None = None
    bits_per_byte: float | None = None

    @classmethod
    def of(cls, source: ModelSource) -> Self:
        """Reads the attributes from the run directory of a source."""
        if not source.is_run:
            return cls()
        origin = load_manifest(source.path).origin
        dataset = Path(origin).name if Path(origin).is_absolute() else origin  # without the path on this machine
        facts = read_record(weights_checkpoint(source.checkpoint or source.path)).facts
        tokens = load_config(source.path).train.stages.first(facts.step) * source.model.block_size
        rows = (row for row in Run(source.path).rows if row.get("step") == facts.step)
        bits_per_byte = next((row["val/bits_per_byte"] for row in rows if "val/bits_per_byte" in row), None)
        if facts.val_loss is not None and bits_per_byte is None:
            log.warning(
                "%s has no evaluation at step %d, so the model card lacks its bits per byte.",
                *(source.path / METRICS, facts.step),
            )
        return cls(dataset, facts.step, tokens, facts.val_loss, bits_per_byte)


def model_title(source: ModelSource) -> str:
    """Returns the name of a model, without the path on this machine."""
    return Run(source.path).name if source.is_run else Path(source.name.removeprefix("hf://")).name


CARD_FILE = "README.md"
LIBRARIES: dict[FormatName, str] = {"hf": "transformers", "gguf": "llama.cpp", "onnx": "onnx"}
USAGE: dict[FormatName, str] = {
    "hf": """from transformers import pipeline

generator = pipeline("text-generation", "<this directory>")
print(generator("Once", max_new_tokens=50, do_sample=False)[0]["generated_text"])""",
    "nanogpt": """import torch

checkpoint = torch.load("ckpt.pt", weights_only=True)  # or: python sample.py --out_dir=<this directory>""",
    "llmc": "./train_gpt2cu -e model.bin",
    "gguf": """llama-completion -m model.gguf -p "Once" -n 50 --temp 0""",
    "onnx": """import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(["logits"], {"input_ids": np.array([[1, 2, 3]])})  # (batch, time, vocabulary)""",
}


def render_model_card(job: "ExportRequest", certificate: "Certificate") -> str:
    """Returns the Markdown text of the model card: description, usage and certificate."""
    front = ["---", *_front(job), "---"]
    uses = "python" if job.format in ("hf", "nanogpt", "onnx") else "sh"
    parts = [
        "\n".join(front),
        f"# {job.title}",
        f"A GPT-2 class language model, exported by gptlab {metadata.version('gptlab')} "
        f"(format={job.format}, {job.dtype}).",
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in _facts(job).items())]),
        f"## Use\n\n```{uses}\n{USAGE[job.format]}\n```",
        "## Certificate\n\nThe export was loaded again and compared with its source model. certificate.json has all "
        "values.\n\n" + "\n".join(f"- {line}" for line in certificate.lines()),
    ]
    return "\n\n".join(parts) + "\n"


def _front(job: "ExportRequest") -> list[str]:
    library = [f"library_name: {LIBRARIES[job.format]}"] if job.format in LIBRARIES else []
    return [*library, "pipeline_tag: text-generation", "tags:", "  - gptlab", "  - gpt2"]


def _facts(job: "ExportRequest") -> dict[str, str]:
    model, info = job.source.model, ModelCardInfo.of(job.source)
    size = f"{model.n_layer} layers, {model.n_head} heads, width {model.n_embd}, block size {model.block_size:,}"
    options = f"positions {model.positions}, norm {model.norm}, activation {model.activation}"
    tokenizer = job.source.record["name"] if job.source.record is not None else "unknown"
    rows = {
        "architecture": f"{size}; {options}; {'with' if model.bias else 'without'} biases; "
        f"head {'tied to the embedding' if model.tie_weights else 'not tied to the embedding'}",
        "parameters": f"{parameter_count(model.model_copy(update={'pad_vocab_to_multiple_of': 1})):,}",
        "tokenizer": f"{tokenizer}, {model.vocab_size:,} token IDs",
        "trained on": info.dataset,
        "steps": f"{info.step:,}" if info.step is not None else None,
        "tokens seen": f"{info.tokens:,}" if info.tokens is not None else None,
        "val loss": f"{info.val_loss:.4f} nats per token" if info.val_loss is not None else None,
        "bits per byte": f"{info.bits_per_byte:.4f}" if info.bits_per_byte is not None else None,
    }
    return {name: value for name, value in rows.items() if value is not None}
