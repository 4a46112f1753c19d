"""Generation with tiny models."""

import torch

from conftest import tiny_config
from gptlab.model.config import SamplingConfig
from gptlab.model.generation.generate import collect_tokens, generate, plain_decoder
from gptlab.model.generation.sampler import row_seeds
from gptlab.model.gpt import GPT
from gptlab.model.modern import build_gpt

CPU = torch.device("cpu")


def sampling(**changes) -> SamplingConfig:
    plain = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, "repetition_penalty": 1.0}
    return SamplingConfig(**plain | changes)


GREEDY = sampling(temperature=0)


def generated(model, prompts, how=GREEDY, *, tokens, seed=0, copies=1, decoder=None) -> list[list[int]]:
    """Returns the generated tokens of each row."""
    seeds = row_seeds(seed, len(prompts) * copies)
    decoder = decoder or plain_decoder(model)
    rows = generate(model, prompts, how, seeds=seeds, max_new_tokens=tokens, decoder=decoder, device=CPU)
    return collect_tokens(rows)


def tiny_model(seed: int = 0, **options) -> GPT:
    torch.manual_seed(seed)
    model = build_gpt(tiny_config(**options))
    for parameter in model.parameters():  # larger than at initialization, where small values could hide an error
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    return model.eval()
