"""Python API of trained models, for notebooks and scripts: ``from gptlab import load``."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from gptlab.config import locations
from gptlab.config.base import validate
from gptlab.config.search_path import configuration_folder
from gptlab.config.trust import trust_packages
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

Text = str | Sequence[int] | Tensor  # a text, or its token IDs (T,)


class TextLoss(NamedTuple):
    """Loss of a model on a text.

    Attributes:
        loss: Mean loss in nats per token, without the first token.
        bits_per_byte: Bits per byte; see ``gptlab.evaluation.loss``.
        nats: Loss (T - 1,) of each token after the first, in nats.
    """

    loss: float
    bits_per_byte: float
    nats: Tensor


class LanguageModel:
    """Trained model with its tokenizer. Its methods accept texts or token IDs.

    Args:
        network: The model, on any device and in training or evaluation mode. Neither is changed.
        tokenizer: Tokenizer of the model.

    Attributes:
        network: The GPT, a ``torch.nn.Module`` with GPT-2's parameter names.
        tokenizer: Tokenizer of the model.
    """

    def __init__(self, network: GPT, tokenizer: Tokenizer) -> None:
        self.network, self.tokenizer = network, tokenizer

    def __repr__(self) -> str:
        config = self.network.config
        count = sum(parameter.numel() for parameter in self.network.parameters())
        return (
            f"LanguageModel({count:,} parameters, n_layer={config.n_layer}, n_head={config.n_head}, "
            f"n_embd={config.n_embd}, block_size={config.block_size}, vocab_size={config.known_vocab_size}, "
            f"device={self.device})"
        )

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.network.parameters()).device

    def ids(self, text: Text) -> Tensor:
        """Returns the token IDs (1, T) of a text on the model's device. "" means the start of a document.

        Raises:
            UserError: There are no token IDs or more than ``block_size``, or an ID is outside of the vocabulary.
        """
        ids = prompt_ids(self.tokenizer, text) if isinstance(text, str) else torch.as_tensor(text).flatten().tolist()
        config = self.network.config
        if not 0 < len(ids) <= config.block_size:
            raise UserError(
                f"The text has {len(ids):,} tokens, but the model accepts 1 to block_size={config.block_size:,} tokens."
            )
        if wrong := [token for token in ids if not 0 <= token < config.known_vocab_size]:
            raise UserError(f"Token IDs must be between 0 and {config.known_vocab_size - 1:,}, but got {wrong[0]}.")
        return torch.tensor([ids], device=self.device)

    def tokens(self, text: Text) -> list[str]:
        """Decodes every token of a text separately, with incomplete characters replaced by U+FFFD."""
        return [self.tokenizer.decode([number]) for number in self.ids(text)[0].tolist()]

    def logits(self, text: Text) -> Tensor:
        """Returns the logits (T, V) of a text. Gradients are recorded unless ``torch.no_grad()`` is active."""
        logits: Tensor = self.network(self.ids(text))
        return logits[0]

    @torch.no_grad()
    def loss(self, text: Text) -> TextLoss:
        """Returns the loss of a text, without its first token. Raises UserError if it has fewer than two tokens."""
        ids = self.ids(text)
        if ids.size(1) < 2:
            raise UserError("The loss requires at least two tokens, because the first token is not predicted.")
        nats = F.cross_entropy(self.logits(ids)[:-1].float(), ids[0, 1:], reduction="none")
        sums = LossSums(torch.from_numpy(self.tokenizer.token_bytes()).to(self.device))
        sums.add(nats, ids[0, 1:])
        return TextLoss(*sums.result(), nats)

    def generate(
        self, prompt: str = "", *, num_samples: int = 1, max_new_tokens: int | None = None, **settings: Any
    ) -> list[str]:
        """Continues a prompt. Returns the same texts as ``gptlab.sample`` with the same options.

        Args:
            prompt: Prompt. "" starts a new document.
            num_samples: Number of texts.
            max_new_tokens: Maximum number of new tokens per text. Default: as in conf/sample.yaml.
            settings: Options of conf/sample.yaml, with the defaults there: seed, stop (a string or a list of strings),
                temperature, top_k, top_p, min_p, repetition_penalty.

        Returns:
            The prompt with its continuation, ``num_samples`` times.

        Raises:
            UserError: An option is unknown or invalid, or the tokenizer cannot encode the prompt.
        """
        defaults = _sample_defaults()
        wanted = {**{key: defaults[key] for key in (*SamplingConfig.model_fields, "seed", "stop")}, **settings}
        seed, stop = wanted.pop("seed"), wanted.pop("stop")
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, Sequence) or not all(isinstance(text, str) and text for text in stops):
            raise UserError(
                f"stop={stop!r} is not valid: it should be a string, or a list of strings that are not empty."
            )
        generator = TextGenerator(
            InferenceModel(self.network, self.tokenizer, self.device, compiled=False),
            [prompt],
            validate(SamplingConfig, wanted),
            stop=stops,
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
        """Names that ``capture`` and ``change`` accept, in the order of the model; see ``gptlab.model.capture``."""
        return activation_names(self.network)

    def capture(self, text: Text, *names: str) -> dict[str, Tensor]:
        """Runs the model on a text and returns activations by name, without the batch dimension.

        Args:
            text: Text of at most ``block_size`` tokens.
            names: Names, or patterns of names: ``h.0``, ``h.*.mlp``, ``*.attn.weights``.

        Returns:
            Activations: (T, C) for most names, (T, 4 C) within an MLP, (nh, T, T) for attention weights.

        Raises:
            UserError: No activation matches a name, or the text is too long.
        """
        with capture_activations(self.network, names) as activations:
            self.logits(text)
        return {name: tensor[0] for name, tensor in activations.items()}

    def change(self, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> AbstractContextManager[None]:
        """Returns a context manager that replaces activations (1, T, ...) with functions of them.

        Args:
            changes: Functions of an activation, by its name or a glob pattern of names (``h.*.mlp``).

        Raises:
            UserError: A pattern matches no name, or matches attention weights, which cannot be replaced.
        """
        return replace_activations(self.network, changes)


class LoadedModel(NamedTuple):
    """Model and tokenizer that ``load`` returns."""

    model: LanguageModel
    tokenizer: Tokenizer


def load(
    name: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    trust: Sequence[str] = (),
    trust_paths: bool = False,
) -> LoadedModel:
    """Loads a trained model.

    Args:
        name: A run directory, the directory of a Hugging Face model, a nanoGPT checkpoint, gpt2, gpt2-medium,
            gpt2-large, gpt2-xl or hf://<owner>/<name>.
        device: Device. Default: the GPU if there is one, otherwise the CPU.
        dtype: dtype of the weights and of the computation.
        trust: Packages whose components (``_target_``) may be built from the configuration of a run directory, in
            addition to those in the environment variable GPTLAB_TRUST, to which they are added.
        trust_paths: Whether to trust paths and URLs in the configuration of a run directory; sets the environment
            variable GPTLAB_TRUST_PATHS.

    Returns:
        The model and its tokenizer.

    Raises:
        UserError: The model does not exist or cannot be read, its tokenizer is unknown, or a component or a path is
            not trusted.
    """
    trust_packages(trust)
    locations.trust_paths(trust_paths)
    source = open_model_source(str(name))
    tokenizer = source.tokenizer()
    network = load_model(source).to(device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)
    return LoadedModel(LanguageModel(network, tokenizer), tokenizer)


@cache
def _sample_defaults() -> dict[str, Any]:
    """Reads the defaults of gptlab.sample."""
    values: dict[str, Any] = yaml.safe_load((configuration_folder() / "sample.yaml").read_text(encoding="utf-8"))
    return values
