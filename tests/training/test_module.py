"""What a step is made of."""

import torch

from gptlab.training.module import seed_generators


def test_generators_are_seeded_as_torch_does_it():
    for seed in (0, 7, 2**64 - 1):
        torch.manual_seed(seed)
        expected = torch.rand(3), torch.nn.functional.dropout(torch.ones(64))
        torch.rand(5)
        seed_generators(seed)
        found = torch.rand(3), torch.nn.functional.dropout(torch.ones(64))
        assert all(map(torch.equal, found, expected))
        if torch.cuda.is_available():
            torch.manual_seed(seed)
            drawn = torch.rand(3, device="cuda")
            seed_generators(seed)
            assert torch.equal(torch.rand(3, device="cuda"), drawn)
