"""Python API of trained models, for notebooks and scripts: ``from gptlab import load``."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from gptlab.config.base import validate
from gptlab.config.command import configuration_folder
from gptlab.data.tokenizers.tokenizer import Tokenizer, prompt_ids
from gptlab.errors import UserError
from gptlab.evaluation.loss import LossSums
from gptlab.model.capture import activation_names, capture_activations, replace_activations
from gptlab.model.config import SamplingConfig
from gptlab.model.generation.sampler import row_seeds
from gptlab.model.gpt import GPT
from gptlab.pretrained.source import open_model_source
from gptlab.pretrained.text_generator import TOKENS_PER_PIECE, InferenceModel, TextGenerator
from gptlab.pretrained.weights import load_model

Text = str | Sequence[int] | Tensor  # a text, or token ids (T,) of one


class TextLoss(NamedTuple):
    """Loss of a model on a text.

    Attributes:
        loss: Nats per token, of the tokens after the first.
        bits_per_byte: See ``gptlab.evaluation.loss``.
        nats: Of each token after the first (T - 1,).
    """

    loss: float
    bits_per_byte: float
    nats: Tensor


class LanguageModel:
    """Trained network with its tokenizer. Its methods take texts or token ids.

    Args:
        network: In its training mode or not, and on any device; both stay as they are.
        tokenizer: Its own.

    Attributes:
        network: The GPT, a torch module with GPT-2's parameter names.
        tokenizer: Encodes and decodes.
    """

    def __init__(self, network: GPT, tokenizer: Tokenizer) -> None:
        self.network, self.tokenizer = network, tokenizer

    def __repr__(self) -> str:
        config = self.network.config
        count = sum(parameter.numel() for parameter in self.network.parameters())
        return (
            f"LanguageModel({count:,} parameters: {config.n_layer} blocks of {config.n_embd}, {config.n_head} heads, "
            f"block {config.block_size:,}, {config.known_vocab_size:,} ids, {self.device})"
        )

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.network.wte.weight.device

    def ids(self, text: Text) -> Tensor:
        """Token ids (1, T) of a text, on the network's device; "" is the start of a new document.

        Raises:
            UserError: There are more than fit the block, or an id that the vocabulary has not.
        """
        ids = prompt_ids(self.tokenizer, text) if isinstance(text, str) else torch.as_tensor(text).flatten().tolist()
        config = self.network.config
        if not 0 < len(ids) <= config.block_size:
            raise UserError(f"A text of {len(ids):,} tokens does not fit: there can be 1 to {config.block_size:,}.")
        if not 0 <= min(ids) <= max(ids) < config.known_vocab_size:
            raise UserError(f"The ids are from 0 to {config.known_vocab_size - 1:,}; one of these is not.")
        return torch.tensor([ids], device=self.device)

    def tokens(self, text: Text) -> list[str]:
        """Decodes every token of a text by itself; incomplete characters become U+FFFD."""
        return [self.tokenizer.decode([number]) for number in self.ids(text)[0].tolist()]

    def logits(self, text: Text) -> Tensor:
        """Returns the logits (T, V) of a text, with gradients unless under torch.no_grad()."""
        logits: Tensor = self.network(self.ids(text))
        return logits[0]

    @torch.no_grad()
    def loss(self, text: Text) -> TextLoss:
        """Returns the loss of a text, without its first token; raises UserError for fewer than two tokens."""
        ids = self.ids(text)
        if ids.size(1) < 2:
            raise UserError("A loss needs a text of two tokens or more: the first is not foretold.")
        nats = F.cross_entropy(self.logits(ids)[:-1].float(), ids[0, 1:], reduction="none")
        sums = LossSums(torch.from_numpy(self.tokenizer.token_bytes()).to(self.device))
        sums.add(nats, ids[0, 1:])
        return TextLoss(*sums.result(), nats)

    def generate(
        self, prompt: str = "", *, num_samples: int = 1, max_new_tokens: int | None = None, **settings: Any
    ) -> list[str]:
        """Continues a prompt; returns the texts that ``gptlab.sample`` prints with the same settings.

        Args:
            prompt: "" begins a new document.
            num_samples: How many texts.
            max_new_tokens: Most that each gains.
            settings: As in conf/sample.yaml, with its defaults: seed, stop, temperature, top_k, top_p, min_p,
                repetition_penalty.
        """
        defaults = _sample_defaults()
        wanted = {**{key: defaults[key] for key in (*SamplingConfig.model_fields, "seed", "stop")}, **settings}
        seed, stop = wanted.pop("seed"), wanted.pop("stop")
        generator = TextGenerator(
            InferenceModel(self.network, self.tokenizer, self.device, compiled=False),
            [prompt],
            validate(SamplingConfig, wanted),
            stop=stop,
            seeds=row_seeds(seed, num_samples),
            max_new_tokens=defaults["max_new_tokens"] if max_new_tokens is None else max_new_tokens,
            tokens_per_piece=TOKENS_PER_PIECE,
        )
        texts = generator.prompts
        for pieces in generator:
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        return texts

    @property
    def names(self) -> list[str]:
        """Names that ``capture`` and ``change`` accept, in the order of the network; see ``gptlab.model.capture``."""
        return activation_names(self.network)

    def capture(self, text: Text, *names: str) -> dict[str, Tensor]:
        """Runs a text through the network and returns activations by name, without the batch dimension.

        Args:
            text: One that fits the block.
            names: Or patterns: ``h.0``, ``h.*.mlp``, ``*.attn.weights``.

        Returns:
            (T, C) of most, (T, 4 C) within an MLP, (nh, T, T) of attention's weights.
        """
        with capture_activations(self.network, names) as activations:
            self.logits(text)
        return {name: tensor[0] for name, tensor in activations.items()}

    def change(self, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> AbstractContextManager[None]:
        """Context manager that replaces activations (1, T, ...) by functions of them."""
        return replace_activations(self.network, changes)


class LoadedModel(NamedTuple):
    """Model and tokenizer that ``load`` returns."""

    model: LanguageModel
    tokenizer: Tokenizer


def load(name: str, *, device: str | None = None, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Loads a trained model.

    Args:
        name: A run directory, a Hugging Face folder, nanoGPT's checkpoint, gpt2, gpt2-medium, gpt2-large, gpt2-xl or
            hf://<owner>/<name>.
        device: One of torch's; None is the GPU where there is one.
        dtype: Of the weights and of what is computed.

    Returns:
        The model and its tokenizer.

    Raises:
        UserError: There is none, it cannot be read, or nothing says what its ids mean.
    """
    source = open_model_source(name)
    tokenizer = source.tokenizer()
    network = load_model(source).to(device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)
    return LoadedModel(LanguageModel(network, tokenizer), tokenizer)


@cache
def _sample_defaults() -> dict[str, Any]:
    """Reads the defaults of gptlab.sample."""
    values: dict[str, Any] = yaml.safe_load((configuration_folder() / "sample.yaml").read_text(encoding="utf-8"))
    return values
