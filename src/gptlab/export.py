"""Exports a trained model for other programs: python -m gptlab.export run=<model> format=<format> out=<dir>."""

import sys
from pathlib import Path
from typing import Annotated, Self

from omegaconf import DictConfig
from pydantic import Field, model_validator

from gptlab.config.base import FrozenConfig, known_keys, validate
from gptlab.config.command import command
from gptlab.config.resolve import resolve_to_dict
from gptlab.exit_codes import DONE, FAILED
from gptlab.exporters.folder import CERTIFICATE, CERTIFICATE_MARK, check_unchanged, list_upload, push
from gptlab.exporters.formats import DtypeName, FormatName, check_format
from gptlab.files import check_output_directory
from gptlab.pretrained.source import open_model_source
from gptlab.terminal import print_message

PUSH_FORMATS = ("hf", "gguf")


class ExportConfig(FrozenConfig):
    """Config of ``python -m gptlab.export``; see conf/export.yaml."""

    run: Annotated[str, Field(min_length=1)]
    format: FormatName
    out: Annotated[str, Field(min_length=1)]
    overwrite: bool
    dtype: DtypeName
    push: Annotated[str, Field(min_length=1)] | None
    dry_run: bool

    @model_validator(mode="after")
    def _check_push(self) -> Self:
        if self.push is not None and self.format not in PUSH_FORMATS:
            raise ValueError(f"push requires format={' or format='.join(PUSH_FORMATS)}, not format={self.format}")
        return self


@command("export", keys=set(known_keys(ExportConfig)), subject="run")
def main(values: DictConfig) -> int:
    """Exports the model, compares the export with the original, and uploads it if ``push`` is set."""
    config = validate(ExportConfig, resolve_to_dict(values))
    out = Path(config.out).expanduser()
    check_output_directory(out, "out", [CERTIFICATE], CERTIFICATE_MARK, overwrite=config.overwrite)
    if not config.overwrite:
        check_unchanged(out)
    source = open_model_source(config.run, "run")
    check_format(config.format, config.dtype, source.model, source.record)  # reports errors before torch is imported
    from gptlab.exporters.exporter import ExportMismatch, export_model

    try:
        certificate = export_model(source, config.format, config.dtype, out)
    except ExportMismatch as error:
        print_message(f"gptlab: {error}", file=sys.stderr)
        return FAILED
    print_message(f"{out}: {config.run} as format={config.format}, {config.dtype}")
    print_message("\n".join(f"  {line}" for line in certificate.lines()))
    print_message(list_upload(out))
    if config.push is not None and config.dry_run:
        print_message(f"Not uploaded, because dry_run=true. Upload it with: hf upload {config.push} {out}")
    elif config.push is not None:
        print_message(f"Uploaded: {push(out, config.push)}")
    return DONE


if __name__ == "__main__":
    main()
