"""Export of a model: reference, files, certificate and model card."""

from importlib import metadata
from pathlib import Path

from gptlab.exporters import gguf, huggingface, llmc, nanogpt, onnx
from gptlab.exporters.certificate import Certificate
from gptlab.exporters.folder import atomic_folder
from gptlab.exporters.formats import FORMATS, DtypeName, FormatName
from gptlab.exporters.model_card import CARD_FILE, model_title, render_model_card
from gptlab.exporters.reference import Reference, make_reference
from gptlab.exporters.request import ExportRequest, FormatModule, tensor_dtypes
from gptlab.model.external import to_external
from gptlab.pretrained.source import ModelSource
from gptlab.pretrained.weights import load_model

WRITERS: dict[FormatName, FormatModule] = {
    "hf": huggingface,
    "nanogpt": nanogpt,
    "llmc": llmc,
    "gguf": gguf,
    "onnx": onnx,
}


class ExportMismatch(Exception):  # noqa: N818
    """Raised if the exported model differs from its source or cannot be loaded."""


def export_model(source: ModelSource, form: FormatName, dtype: DtypeName, out: Path) -> Certificate:
    """Exports a model to ``out``, and compares the export with the model.

    Args:
        source: Model to export.
        form: Export format.
        dtype: dtype of the weights.
        out: Directory of the export. If it has files, those of an earlier export and those of the same name are
            replaced.

    Returns:
        The certificate, which is also saved in ``out``.

    Raises:
        ExportMismatch: The export differs from the model. ``out`` is not created.
        UserError: The directory cannot be created or written, or the source cannot be read.
    """
    tokenizer = source.tokenizer() if source.record is not None else None
    job = ExportRequest(source, form, dtype, tokenizer, model_title(source))
    with atomic_folder(out) as folder:
        reference = _write(job, folder)  # frees the memory of the model before another library loads the export
        try:
            checked = WRITERS[form].check(job, folder, reference)
        except Exception as error:  # other libraries raise many types
            reason = str(error).strip() or type(error).__name__
            raise ExportMismatch(f"{out} was not written, because the export cannot be loaded: {reason}") from error
        about = {"gptlab": metadata.version("gptlab"), "model": job.title, "format": form, "dtype": dtype}
        certificate = Certificate(about, reference, checked.checks, checked.unchecked)
        if failed := certificate.failed:
            differences = "; ".join(f"{check.what} by {check.by}: {check.result}" for check in failed)
            raise ExportMismatch(
                f"{out} was not written, because the export differs from {source.name}: {differences}."
            )
        (folder / CARD_FILE).write_text(render_model_card(job, certificate), encoding="utf-8")
        certificate.save(folder)
    return certificate


def _write(job: ExportRequest, folder: Path) -> Reference:
    """Computes the reference, then writes the files."""
    model = load_model(job.source).requires_grad_(False)
    biases = FORMATS[job.format].biases
    stored = tensor_dtypes(job, to_external(model, transposed=False, biases=biases))
    reference = make_reference(model, stored, biases=biases, end_of_text=job.end_of_text)
    WRITERS[job.format].write(model, job, folder)
    return reference
