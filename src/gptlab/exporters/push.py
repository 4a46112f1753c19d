"""To the Hugging Face hub. Imports no torch."""

from pathlib import Path

from gptlab.errors import UserError, first_line
from gptlab.exporters.folder import file_sizes


def list_upload(folder: Path) -> str:
    """List what would be uploaded of a folder."""
    found = file_sizes(folder)
    lines = [f"  {size:>13,} bytes  {name}" for name, size in found.items()]
    return "\n".join([*lines, f"  {sum(found.values()):>13,} bytes in all"])


def push(folder: Path, repository: str) -> str:
    """Upload a folder to a model repository, which is made where there is none; return its address.

    The token is the one that ``hf auth login`` keeps, or HF_TOKEN.

    Raises:
        UserError: It cannot be uploaded.
    """
    from huggingface_hub import HfApi  # half a second, for those alone who need it
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
