"""Models of the Hugging Face hub, out of its cache on this machine or through the network. Imports no torch."""

import os
from pathlib import Path

from gptlab.config.schema import GPT2_REPOSITORIES, HUB_PREFIX
from gptlab.errors import UserError, first_line

FILES = [
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
]


def hub_folder(name: str) -> Path:
    """Find the folder of a model in the hub's cache, or download it into that; safetensors alone, never a pickle.

    Raises:
        UserError: It is not there, and cannot be downloaded.
    """
    from huggingface_hub import snapshot_download  # half a second, for those alone who need it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository = GPT2_REPOSITORIES.get(name) or name.removeprefix(HUB_PREFIX)
    try:
        folder = Path(snapshot_download(repository, allow_patterns=FILES, local_files_only=True))
        if any(folder.glob("*.safetensors")):
            return folder
    except (LocalEntryNotFoundError, HFValidationError):
        pass  # the network says what is wrong with a name
    try:
        return Path(snapshot_download(repository, allow_patterns=FILES))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        home = os.environ.get("HF_HOME", "~/.cache/huggingface")
        raise UserError(
            f"{name} is neither in the cache of the Hugging Face hub ({home}) nor to be had through the network: "
            f"{first_line(error)}\nTo get it: on a machine with internet, hf download {repository} config.json "
            "model.safetensors tokenizer.json --local-dir <folder>; copy that folder here, and name it instead."
        ) from error
