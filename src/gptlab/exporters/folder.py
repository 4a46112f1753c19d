"""Folder of an export: written whole or not at all, and uploaded to the Hugging Face hub. Imports no torch."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptlab.data.shards.manifest import fsync_path
from gptlab.errors import UserError, first_line


def check_output_free(out: Path) -> None:
    """Raises UserError if ``out`` exists and is not an empty folder."""
    if out.is_symlink() or (out.exists() and not out.is_dir()) or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"out={out} is there already: an export makes a new folder, or fills an empty one.")


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder beside ``out`` and renames it to ``out`` at the end; removes it after an exception.

    Raises:
        UserError: The folder cannot be created.
    """
    out = out.absolute()
    beside = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}"
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"out={out} cannot be made: {error}.") from error
    try:
        yield beside
        for file in beside.iterdir():
            fsync_path(file)
        check_output_free(out)  # it may have been made in the meantime
        beside.rename(out)  # over an empty folder, too
        fsync_path(out.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def list_upload(folder: Path) -> str:
    """Lists the files that would be uploaded, with their sizes in bytes."""
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    lines = [f"  {size:>13,} bytes  {name}" for name, size in sizes.items()]
    return "\n".join([*lines, f"  {sum(sizes.values()):>13,} bytes in all"])


def push(folder: Path, repository: str) -> str:
    """Uploads a folder to a model repository, created if missing, and returns the repository's URL.

    The token is that of ``hf auth login``, or HF_TOKEN.

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
            f"{folder} is written, but push={repository} failed: {first_line(error)}\n"
            f"To upload it later: hf auth login, and hf upload {repository} {folder}"
        ) from error
    return str(address)
