"""Directory of an export: written atomically, and uploaded to the Hugging Face Hub. Imports no torch."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gptlab.errors import UserError, failure_reason, first_line
from gptlab.files import fsync_path, is_plain_name, read_regular
from gptlab.parsing import parse_json

CERTIFICATE = "certificate.json"
CERTIFICATE_MARK = '{\n  "gptlab": '  # beginning of a certificate


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary directory, which becomes ``out`` on success and is deleted after an exception.

    If ``out`` already has files, those of an earlier export are replaced, and so are those of the same name.

    Raises:
        UserError: The directory cannot be created or a file in ``out`` cannot be replaced.
    """
    out = out.absolute()
    temporary = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"out={out} cannot be created: {failure_reason(error)}.") from error
    try:
        yield temporary
        for file in temporary.iterdir():
            fsync_path(file)
        if out.is_dir() and any(out.iterdir()):
            _replace_files(temporary, out)
        else:
            temporary.rename(out)  # also replaces an empty directory
        fsync_path(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_unchanged(out: Path) -> None:
    """Checks that the files of an earlier export have not been changed since, such as a model card that was edited.

    Raises:
        UserError: A file is newer than the certificate, which is written last.
    """
    with suppress(OSError):
        exported = (out / CERTIFICATE).stat().st_mtime_ns
        for path in sorted(out.iterdir()):
            if path.stat().st_mtime_ns > exported:
                raise UserError(
                    f"out={out}: {path.name} has been changed since the export. Choose a new directory, or replace it "
                    "with overwrite=true."
                )


def _replace_files(folder: Path, out: Path) -> None:
    """Moves an export to a directory with files, and removes other files of the export before it.

    The certificate is removed first and moved last, so that it never describes files of another export.
    """
    try:
        earlier = list(filter(is_plain_name, parse_json(read_regular(out / CERTIFICATE)).get("files", [])))
    except (OSError, ValueError, AttributeError, TypeError):  # missing, or not a certificate
        earlier = []
    try:
        for name in (CERTIFICATE, *earlier):
            (out / name).unlink(missing_ok=True)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == CERTIFICATE):
            file.replace(out / file.name)
    except OSError as error:
        raise UserError(f"out={out}: {failure_reason(error)}. Remove it or choose a new directory.") from error


def list_upload(folder: Path) -> str:
    """Returns a list of the files to upload, with their sizes in bytes."""
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    lines = [f"  {size:>13,} bytes  {name}" for name, size in sizes.items()]
    return "\n".join([*lines, f"  {sum(sizes.values()):>13,} bytes in total"])


def push(folder: Path, repository: str) -> str:
    """Uploads a directory to a model repository on the Hugging Face Hub, and returns the URL of the repository.

    Creates the repository if it does not exist. Authenticates with the token of ``hf auth login`` or HF_TOKEN.

    Args:
        folder: Directory to upload.
        repository: Repository ID, ``<owner>/<name>``.

    Raises:
        UserError: The upload fails.
    """
    from huggingface_hub import HfApi  # takes half a second to import
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        hub = HfApi()
        address = hub.create_repo(repository, exist_ok=True)
        hub.upload_folder(folder_path=folder, repo_id=repository, commit_message="Export from gptlab")
    except (OSError, HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        raise UserError(
            f"{folder} was written, but the upload push={repository} failed: {first_line(error)}\n"
            f"Upload it later with: hf auth login, then hf upload {repository} {folder}"
        ) from error
    return str(address)
