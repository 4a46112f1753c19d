"""An export from start to end: reference, files, certificate, model card."""

from importlib import metadata
from pathlib import Path

from gptlab.exporters import gguf, huggingface, llmc, nanogpt, onnx
from gptlab.exporters.certificate import Certificate
from gptlab.exporters.folder import atomic_folder
from gptlab.exporters.formats import FORMATS, DtypeName, FormatName
from gptlab.exporters.model_card import CARD_FILE, model_title, render_model_card
from gptlab.exporters.reference import Reference, make_reference
from gptlab.exporters.request import ExportRequest, tensor_dtypes
from gptlab.model.external import to_external
from gptlab.pretrained.source import ModelSource
from gptlab.pretrained.weights import load_model

WRITERS = {"hf": huggingface, "nanogpt": nanogpt, "llmc": llmc, "gguf": gguf, "onnx": onnx}


class ExportMismatch(Exception):  # noqa: N818
    """The exported model differs from its source; the message says how."""


def export_model(source: ModelSource, form: FormatName, dtype: DtypeName, out: Path) -> Certificate:
    """Writes a model to ``out`` and compares what was written with it.

    Raises:
        ExportMismatch: The export differs from the model; nothing of it is left.
        UserError: The folder cannot be created, or the source cannot be read.
    """
    tokenizer = source.tokenizer() if source.record is not None else None
    job = ExportRequest(source, form, dtype, tokenizer, model_title(source))
    with atomic_folder(out) as folder:
        reference = _write(job, folder)  # our model is gone before another library loads its own
        try:
            checked = WRITERS[form].check(job, folder, reference)
        except Exception as error:  # whatever another library raises for a file that it cannot read
            why = str(error).strip() or type(error).__name__
            raise ExportMismatch(f"{out} is not written: what was exported cannot be loaded again. {why}") from error
        about = {"gptlab": metadata.version("gptlab"), "model": job.title, "format": form, "dtype": dtype}
        certificate = Certificate(about, reference, checked.checks, checked.unchecked)
        if failed := certificate.failed:
            differences = "; ".join(f"{check.what} by {check.by}: {check.result}" for check in failed)
            raise ExportMismatch(f"{out} is not written: what was exported is not {source.name}. {differences}.")
        certificate.save(folder)
        (folder / CARD_FILE).write_text(render_model_card(job, certificate), encoding="utf-8")
    return certificate


def _write(job: ExportRequest, folder: Path) -> Reference:
    """Computes the reference, then writes the files."""
    model = load_model(job.source).requires_grad_(False)
    biases = FORMATS[job.format].biases
    stored = tensor_dtypes(job, to_external(model, transposed=False, biases=biases))
    reference = make_reference(model, stored, biases=biases, end_of_text=job.end_of_text)
    WRITERS[job.format].write(model, job, folder)
    return reference
