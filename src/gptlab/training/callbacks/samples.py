"""Text samples during training."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

import lightning as L

from gptlab.data.tokenizers.text import END_OF_TEXT, unescape_line_breaks
from gptlab.data.tokenizers.tokenizer import Tokenizer, prompt_ids
from gptlab.files import skip_if_disk_full, write_file
from gptlab.model.config import SamplingConfig
from gptlab.model.generation.generate import NonFiniteLogitsError, collect_tokens, generate, plain_decoder
from gptlab.model.generation.sampler import row_seeds
from gptlab.training.config import SamplesConfig
from gptlab.training.distributed.strategies import any_length
from gptlab.training.module import GPTModule, derive_seed

log = logging.getLogger(__name__)

HEADING = "--- sample {} ---\n"


class Samples(L.Callback):
    """Generates text samples after every evaluation and writes them to ``<folder>/step_<step>.txt``.

    Args:
        config: Prompt, number of samples and sampling parameters.
        tokenizer: Encodes the prompt and decodes the samples.
        folder: Output directory; created when needed.
        seed: Seed from which, with the step, the seeds of the samples are derived. The random state of training does
            not change.

    Attributes:
        latest: The texts of the latest evaluation.
        listeners: Called with the step, on the first rank, after the texts are written.
    """

    def __init__(self, config: SamplesConfig, tokenizer: Tokenizer, folder: Path, seed: int) -> None:
        self.config, self.tokenizer, self.folder, self.seed = config, tokenizer, folder, seed
        self.sampling = SamplingConfig(
            temperature=config.temperature, top_k=config.top_k, top_p=None, min_p=None, repetition_penalty=1
        )
        self.latest: list[str] = []
        self.listeners: list[Callable[[int], None]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Generates the same samples on every rank (a sharded model needs all ranks); the first rank writes them."""
        assert isinstance(pl_module, GPTModule)  # noqa: S101
        device, step = pl_module.device, trainer.global_step
        prompt = prompt_ids(self.tokenizer, unescape_line_breaks(self.config.prompt))
        with any_length(trainer):
            rows = generate(
                pl_module.model,
                [prompt],
                self.sampling,
                seeds=row_seeds(derive_seed(self.seed, step), self.config.num_samples),
                max_new_tokens=self.config.max_new_tokens,
                decoder=plain_decoder(pl_module.model),
                device=device,
            )
            try:
                texts = collect_tokens(rows)
            except NonFiniteLogitsError:
                log.warning("step %d: no samples, because the logits of the model are not finite.", step)
                self.latest = []
                return
        self.latest = [self.tokenizer.decode(prompt + text).removeprefix(END_OF_TEXT) for text in texts]
        if trainer.is_global_zero:
            path = self.folder / f"step_{step:06d}.txt"
            text = "\n\n".join(f"{HEADING.format(i)}{sample}" for i, sample in enumerate(self.latest, 1))
            with skip_if_disk_full(path):
                self.folder.mkdir(exist_ok=True)
                write_file(path, text + "\n")
            for listener in self.listeners:
                listener(step)


def parse_samples(written: str) -> list[str]:
    """Returns the texts of one evaluation from the contents of its file."""
    _, *texts = re.split(f"^{HEADING.format('[0-9]+')}", written, flags=re.MULTILINE)
    return [text.removesuffix("\n\n") for text in texts[:-1]] + [text.removesuffix("\n") for text in texts[-1:]]
