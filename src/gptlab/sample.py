"""Generates text with a trained model: python -m gptlab.sample run=<model> [key=value ...]."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from omegaconf import DictConfig
from pydantic import Field, model_validator

from gptlab.config.base import known_keys, validate
from gptlab.config.command import command
from gptlab.config.resolve import resolve_to_dict
from gptlab.config.schema import Seed
from gptlab.data.tokenizers.text import unescape_line_breaks
from gptlab.errors import UserError, failure_reason
from gptlab.exit_codes import DONE
from gptlab.model.config import NumNewTokens, NumSamples, SamplingConfig
from gptlab.pretrained.source import ModelSource, open_model_source
from gptlab.terminal import print_data, print_message

if TYPE_CHECKING:
    from gptlab.pretrained.text_generator import InferenceModel, TextGenerator


class SampleConfig(SamplingConfig):
    """Config of ``python -m gptlab.sample``; see conf/sample.yaml and ``gptlab.model.generation.generate``."""

    run: Annotated[str, Field(min_length=1)]
    prompt: str
    prompts: str | None
    num_samples: NumSamples
    max_new_tokens: NumNewTokens
    stop: list[Annotated[str, Field(min_length=1)]]
    seed: Seed
    precision: Literal["float32", "bfloat16"]
    int8: bool
    compile: Literal["auto"] | bool
    stream: bool
    interactive: bool
    report: bool

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        if self.prompts is not None and (self.prompt or self.interactive):
            raise ValueError("prompts cannot be combined with prompt or interactive=true")
        if self.interactive and self.prompt:
            raise ValueError("interactive=true reads prompts from the terminal and cannot be combined with prompt")
        return self

    @model_validator(mode="after")
    def _check_single_text(self) -> Self:
        if (self.stream or self.interactive) and (self.num_samples > 1 or self.prompts is not None):
            override = "interactive=true" if self.interactive else "stream=true"
            raise ValueError(f"{override} prints one text at a time and requires num_samples=1 and no file of prompts")
        return self

    @property
    def sampling(self) -> SamplingConfig:
        """Sampling options."""
        return SamplingConfig(**{name: getattr(self, name) for name in SamplingConfig.model_fields})


@command("sample", keys=set(known_keys(SampleConfig)), literal_keys=("prompt",), subject="run")
def main(values: DictConfig) -> int:
    """Loads the model, generates texts and prints them."""
    config = validate(SampleConfig, resolve_to_dict(values))
    source = open_model_source(config.run, "run")  # reports errors before torch is imported
    lines = [config.prompt] if config.prompts is None else _read_prompts(Path(config.prompts).expanduser())
    prompts = [unescape_line_breaks(line) for line in lines]
    inference = _load(config, source)
    if config.interactive:
        _converse(config, inference)
    elif config.stream:
        _print_stream(_generator(config, inference, prompts, config.seed), config)
    else:
        _print_texts(_generator(config, inference, prompts, config.seed), config)
    return DONE


def _read_prompts(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # without a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={path} cannot be read: {failure_reason(error)}.") from error
    if not text:
        raise UserError(f"prompts={path} is empty. It must contain one prompt per line.")
    return text.removesuffix("\n").split("\n")  # str.splitlines also splits at form feeds and U+2028


def _load(config: SampleConfig, source: ModelSource) -> "InferenceModel":
    from gptlab.pretrained.text_generator import build_inference_model
    from gptlab.pretrained.weights import load_model

    tokenizer = source.tokenizer()
    return build_inference_model(
        load_model(source),
        tokenizer,
        precision=config.precision,
        int8=config.int8,
        compile=config.compile,
        max_new_tokens=config.max_new_tokens,
    )


def _generator(config: SampleConfig, inference: "InferenceModel", prompts: list[str], seed: int) -> "TextGenerator":
    from gptlab.model.generation.sampler import row_seeds
    from gptlab.pretrained.text_generator import TOKENS_PER_PIECE, TextGenerator

    generator = TextGenerator(
        inference,
        prompts,
        config.sampling,
        stop=[unescape_line_breaks(text) for text in config.stop],
        seeds=row_seeds(seed, len(prompts) * config.num_samples),
        max_new_tokens=config.max_new_tokens,
        tokens_per_piece=1 if config.stream or config.interactive else TOKENS_PER_PIECE,
    )
    if generator.may_exceed_block:
        block = inference.model.config.block_size
        note = f"A text longer than block_size={block} tokens continues from its last {max(1, block // 2)} tokens."
        print_message(note, file=sys.stderr)
    return generator


def _print_texts(generator: "TextGenerator", config: SampleConfig) -> None:
    """Prints all texts after they are complete."""
    texts = generator.prompts
    for pieces in generator:
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    for text in texts:
        print_data(f"{text}\n{'-' * 80}")
    _report(generator, config)


def _print_stream(generator: "TextGenerator", config: SampleConfig) -> None:
    """Prints one text as it is generated."""
    print_data(generator.prompts[0], end="")
    for (piece,) in generator:
        print_data(piece, end="")
    print_data("")
    _report(generator, config)


def _report(generator: "TextGenerator", config: SampleConfig) -> None:
    from gptlab.pretrained.text_generator import report

    if config.report:
        print_message(report(generator.speed(), generator.inference.device))


def _converse(config: SampleConfig, inference: "InferenceModel") -> None:
    """Continues prompts from the terminal until Ctrl-D; Ctrl-C ends a text."""
    from gptlab.model.generation.sampler import row_seeds

    print_message("Enter a prompt. Ctrl-C ends a text, Ctrl-D exits.")
    number = 0
    while True:
        try:
            prompt = input("> ")
            number += 1
            _print_stream(_generator(config, inference, [prompt], row_seeds(config.seed, number)[-1]), config)
        except KeyboardInterrupt:
            print_message("")
        except EOFError:
            print_message("")
            return
        except UserError as error:  # a character that is not in the vocabulary
            print_message(error)


if __name__ == "__main__":
    main()
