import pytest
import torch

from conftest import tiny_config
from gptlab.model.generate import draw, generate
from gptlab.model.gpt import GPT


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(tiny_config())


def test_same_seed_same_text_whatever_else_is_random(model):
    prompt = torch.zeros((2, 1), dtype=torch.long)
    options = {"max_new_tokens": 20, "temperature": 1.0, "top_k": None}
    first = generate(model, prompt, **options, generator=seeded(1))
    torch.manual_seed(99)
    assert torch.equal(first, generate(model, prompt, **options, generator=seeded(1)))
    assert not torch.equal(first, generate(model, prompt, **options, generator=seeded(2)))
    assert not torch.equal(first[0], first[1])


def test_the_training_s_randomness_and_mode_are_left_alone(model):
    model.train()
    before = torch.get_rng_state()
    generate(
        model, torch.zeros((1, 1), dtype=torch.long), max_new_tokens=3, temperature=1.0, top_k=5, generator=seeded(1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_a_text_may_grow_past_the_block(model):
    prompt = torch.arange(16)[None]
    grown = generate(model, prompt, max_new_tokens=3, temperature=0, top_k=None, generator=seeded(0))
    by_hand = prompt
    for _ in range(3):  # only the last 16 tokens are seen
        by_hand = torch.cat((by_hand, model(by_hand[:, -16:])[:, -1:].argmax(-1)), dim=1)
    assert grown.tolist() == by_hand.tolist()


def test_draws_follow_the_tempered_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    drawn = draw(logits.expand(200_000, 4), temperature=2.0, top_k=None, generator=seeded(0))
    expected = torch.softmax(logits / 2, dim=0)
    # four standard errors of a share are 0.0045 here
    torch.testing.assert_close(drawn.flatten().bincount() / 200_000, expected, atol=0.0045, rtol=0)


def test_top_k_draws_from_the_k_likeliest_alone():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    drawn = draw(logits.expand(10_000, 4), temperature=1.0, top_k=2, generator=seeded(0))
    assert set(drawn.flatten().tolist()) == {1, 3}
