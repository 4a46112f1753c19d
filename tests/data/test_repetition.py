"""The warning of a run that repeats its training data."""

from types import SimpleNamespace

import pytest

from gptlab.data.repetition import repetition_warning

CORPUS = SimpleNamespace(origin="corpus.txt", tokens=lambda split: {"train": 1_000, "val": 7}[split])


@pytest.mark.parametrize("tokens", [1, 1_000, 4_000])
def test_up_to_four_epochs_are_no_reason_for_a_warning(tokens):
    assert repetition_warning(tokens, CORPUS) is None


def test_more_than_four_epochs_are_reported_with_their_number():
    assert "187,500 training tokens are 187.5 epochs of corpus.txt (1,000 tokens)" in repetition_warning(
        187_500, CORPUS
    )
