"""Generation with a KV cache, compared with recomputation and with transformers."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import tiny_config
from generating import CPU, GREEDY, generated, sampling, tiny_model
from gptlab.model.generation.generate import collect_tokens, generate, plain_decoder
from gptlab.model.generation.kv_cache import CachePosition, KVCache
from gptlab.model.generation.sampler import row_seeds
from gptlab.model.gpt import GPT
from gptlab.model.modern import build_gpt

NETWORKS = {
    "GPT-2": {},
    "no biases, untied": {"bias": False, "tie_weights": False, "pad_vocab_to_multiple_of": 64},
    "rotary, qk_norm": {"positions": "rotary", "qk_norm": True, "norm": "rms"},
    "rotary_half, soft cap": {"positions": "rotary_half", "logit_soft_cap": 5.0, "embedding_norm": True},
    "window": {"n_layer": 4, "attention_window": 5, "global_every": 3, "positions": "rotary"},
    "values": {"n_layer": 4, "value_residual": True, "value_embeddings": 2},
    "skips": {"n_layer": 4, "x0_skips": True, "unet_skips": True},
}


@pytest.fixture
def model() -> GPT:
    return tiny_model()


@pytest.mark.parametrize("bucket", [1, 8])
@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
@torch.no_grad()
def test_cached_logits_equal_those_without_cache_in_single_and_ragged_batches(options, bucket):
    model, idx, begins = tiny_model(**options), torch.randint(61, (3, 16)), torch.tensor([0, 3, 6])
    for rows, ragged in (((0,), False), ((0, 1, 2), False), ((0, 1, 2), True)):
        cache, first, at = KVCache(model.config.n_layer, 16), 7, torch.tensor(rows)
        for width in range(first, 17):  # a prefill of seven tokens, then one token at a time
            slots = torch.arange(first if width == first else 1) + (0 if width == first else width - 1)
            visible = width if width == first else -(-width // bucket) * bucket
            position = CachePosition(slots, begins[at] if ragged else None, visible, is_end=visible == width)
            found = model.next_logits(idx[at][:, slots], cache, position)
            for row in rows:
                begin = begins[row] if ragged else 0
                expected = model(idx[row : row + 1, begin:width])[0, -1]
                torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("copies", [1, 2])
def test_greedy_rows_of_different_lengths_match_transformers(copies):
    torch.manual_seed(0)
    sizes = {"n_positions": 32, "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 2}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3, bos_token_id=0, eos_token_id=None)).eval()
    ours = build_gpt(tiny_config(block_size=32))
    state = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        theirs_is = state[name if name.startswith("lm_head") else f"transformer.{name}"]
        is_conv1d = name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))
        tensor.copy_(theirs_is.T if is_conv1d else theirs_is)
    prompts = [[5], [1, 2, 3, 4, 5, 6, 7], [60, 59, 58]]
    found = generated(ours, prompts, tokens=20, copies=copies)
    for row, ids in enumerate(found):
        prompt = torch.tensor([prompts[row // copies]])
        expected = theirs.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert ids == expected[0, prompt.size(1) :].tolist()


def test_a_row_does_not_depend_on_other_rows_or_on_max_new_tokens(model):
    prompts, how = [[1, 2, 3], [4], list(range(5, 20)), [7] * 40], sampling(top_k=20, repetition_penalty=1.2)
    together = generated(model, prompts, how, tokens=40)  # exceeds block_size, in every row at a different step
    seeds = row_seeds(0, 4)
    for row, prompt in enumerate(prompts):
        rows = generate(
            model, [prompt], how, seeds=[seeds[row]], max_new_tokens=30, decoder=plain_decoder(model), device=CPU
        )
        assert collect_tokens(rows)[0] == together[row][:30]
    assert len({tuple(row) for row in generated(model, [[1]], sampling(), tokens=20, copies=4)}) == 4


def test_several_samples_of_a_prompt_equal_samples_of_its_copies(model):
    prompts = [[1, 2, 3], [4]]
    copies = [prompt for prompt in prompts for _ in range(3)]
    assert generated(model, prompts, sampling(), tokens=25, copies=3) == generated(model, copies, sampling(), tokens=25)


def test_samples_depend_only_on_the_seed_and_leave_torch_s_random_state_unchanged(model):
    model.train()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    first = generated(model, [[0]], sampling(), tokens=20, copies=2, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    torch.manual_seed(98)
    assert first == generated(model, [[0]], sampling(), tokens=20, copies=2, seed=1)
    assert first != generated(model, [[0]], sampling(), tokens=20, copies=2, seed=2)


def test_beyond_block_size_generation_continues_from_the_last_half_of_the_context(model):
    with torch.no_grad():
        for length in (1, 15, 16, 17, 40):
            text, context = list(range(length)), list(range(length))
            for _ in range(30):
                context = context if len(context) <= 16 else context[-8:]
                token = model(torch.tensor([context]))[0, -1].argmax().item()
                text.append(token)
                context.append(token)
            assert generated(model, [list(range(length))], tokens=30) == [text[length:]]


def test_each_token_is_yielded_before_the_next_is_computed(model):
    scored = []

    def score(idx, cache, position):
        scored.append(position.slots.item())
        return model.next_logits(idx, cache, position)

    decoder = type(plain_decoder(model))(score, 1)
    rows = generate(model, [[1, 2]], GREEDY, seeds=[0], max_new_tokens=9, decoder=decoder, device=CPU)
    next(rows)
    assert scored == []
    next(rows)
    assert scored == [2]
    rows.close()


def test_the_cache_is_allocated_once(model):
    addresses = set()

    def score(idx, cache, position):
        addresses.add(tuple(layer.keys.data_ptr() for layer in cache.layers))
        return model.next_logits(idx, cache, position)

    generated(model, [[1], [2, 3]], tokens=50, decoder=type(plain_decoder(model))(score, 1))
    assert len(addresses) == 1
