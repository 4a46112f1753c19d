"""Names of models of the Hugging Face hub. Imports no torch."""

from pathlib import Path

# OpenAI's four (Radford et al. 2019, table 2), by the names under which nanoGPT and transformers know them
REPOSITORIES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
ADDRESS = "hf://"  # of any other: hf://<owner>/<name>


def is_on_hub(name: str) -> bool:
    """Whether ``name`` is a model of the hub; a folder or a file of that name comes first."""
    return (name in REPOSITORIES or name.startswith(ADDRESS)) and not Path(name).exists()
