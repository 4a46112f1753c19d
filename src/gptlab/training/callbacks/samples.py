"""Samples as the model learns."""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.plugins.precision import Precision

from gptlab.data.tokenizers import END_OF_TEXT, Tokenizer, prompt_ids
from gptlab.model.generate import generate
from gptlab.training.config import SamplesConfig
from gptlab.training.module import GPTModule, derive_seed
from gptlab.training.strategies import gathered


class Samples(L.Callback):
    """Writes <folder>/step_<step>.txt after every evaluation.

    Args:
        config: How to sample.
        tokenizer: To read the prompt and write the text.
        folder: Made when it is needed.
        seed: With the step, the seed of the samples; the training's own randomness is not touched.
    """

    def __init__(self, config: SamplesConfig, tokenizer: Tokenizer, folder: Path, seed: int) -> None:
        self.config, self.tokenizer, self.folder, self.seed = config, tokenizer, folder, seed
        self.latest: list[str] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Generate on every rank alike (a sharded network needs them all), write on the first."""
        assert isinstance(pl_module, GPTModule)  # noqa: S101
        assert isinstance(trainer.precision_plugin, Precision)  # noqa: S101
        device, step = pl_module.device, trainer.global_step
        prompt = torch.tensor(prompt_ids(self.tokenizer, self.config.prompt), device=device)
        eager = torch.compiler.set_stance("force_eager")  # a compiled network would be compiled anew for every length
        with eager, gathered(trainer.strategy), trainer.precision_plugin.forward_context():
            ids = generate(
                pl_module.model,
                prompt.expand(self.config.num_samples, -1),  # (B, T)
                max_new_tokens=self.config.max_new_tokens,
                temperature=self.config.temperature,
                top_k=self.config.top_k,
                generator=torch.Generator(device).manual_seed(derive_seed(self.seed, step)),
            )
        self.latest = [self.tokenizer.decode(row).removeprefix(END_OF_TEXT) for row in ids.tolist()]
        if trainer.is_global_zero:
            self.folder.mkdir(exist_ok=True)
            text = "\n\n".join(f"--- sample {i} ---\n{sample}" for i, sample in enumerate(self.latest, 1))
            (self.folder / f"step_{step:06d}.txt").write_text(text + "\n", encoding="utf-8")
