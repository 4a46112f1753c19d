"""Let a trained model write: python -m gptlab.sample run=<run directory> [key=value ...]."""

from pathlib import Path
from typing import Annotated

from omegaconf import DictConfig
from pydantic import Field, NonNegativeFloat, PositiveInt

from gptlab.experiments.command import command
from gptlab.experiments.directory import load_config
from gptlab.experiments.exits import DONE
from gptlab.experiments.resuming import plain
from gptlab.experiments.schema import Seed, check, known_keys
from gptlab.settings import Settings


class SampleConfig(Settings):
    """What to write, and how; see conf/sample.yaml and ``gptlab.model.generate``."""

    run: Annotated[str, Field(min_length=1)]
    prompt: str
    num_samples: PositiveInt
    max_new_tokens: PositiveInt
    temperature: NonNegativeFloat
    top_k: PositiveInt | None
    seed: Seed


@command("sample", keys=set(known_keys(SampleConfig)), literal=("prompt",))
def main(values: DictConfig) -> int:
    """Load the run's best weights, continue the prompt, print the texts."""
    config = check(SampleConfig, plain(values))
    directory = Path(config.run).expanduser()
    load_config(directory)  # says what is wrong before torch is imported
    for text in _texts(config, directory):
        print(text, "-" * 80, sep="\n")
    return DONE


def _texts(config: SampleConfig, directory: Path) -> list[str]:
    import torch

    from gptlab.data.shards import load_manifest
    from gptlab.data.tokenizers import END_OF_TEXT, load_tokenizer, prompt_ids
    from gptlab.experiments.weights import load_model
    from gptlab.model.generate import generate

    tokenizer = load_tokenizer(load_manifest(directory).tokenizer, load_config(directory).tokenizer.vocab_dir)
    prompt = torch.tensor(prompt_ids(tokenizer, config.prompt))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ids = generate(
        load_model(directory).to(device),
        prompt.to(device).expand(config.num_samples, -1),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        generator=torch.Generator(device).manual_seed(config.seed),
    )
    return [tokenizer.decode(row).removeprefix(END_OF_TEXT) for row in ids.tolist()]


if __name__ == "__main__":
    main()
