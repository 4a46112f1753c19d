"""What a certificate passes and what it does not, and what is left of an export that differs."""

import pytest
import torch

from exports import export, random_model
from gptlab.errors import UserError
from gptlab.exporters import exporter, llmc
from gptlab.exporters.certificate import (
    compare_greedy,
    compare_logits,
    compare_scores,
    compare_tensors,
    compare_texts,
)
from gptlab.exporters.reference import GreedyContinuation, Reference, tensor_hash


def reference(**changes) -> Reference:
    one = Reference(
        prompts=torch.tensor([[1, 2]]),
        logits=torch.tensor([[[0.0, 50.0, -1.0], [4.0, 0.0, 2.0]]]),
        beginning=[1],
        greedy=GreedyContinuation([2, 0, 1], [1.0, 0.002, 0.5]),
        tensors={"a": tensor_hash(torch.tensor([1.0, 2.0])), "b": tensor_hash(torch.tensor([3.0]))},
        rounding=None,
        end_of_text=None,
    )
    return one._replace(**changes)


def test_logits_may_differ_in_parts_of_the_largest():
    below, above = (compare_logits(difference, reference(), "x", 1e-3) for difference in (0.05, 0.0501))
    assert (below.passed, above.passed) == (True, False)
    assert below.tolerance == pytest.approx(0.05)
    assert not compare_logits(float("nan"), reference(), "x", 1e-3).passed
    small = reference(logits=torch.full((1, 2, 3), 0.1))
    assert compare_logits(0.0, small, "x", 1e-3).tolerance == pytest.approx(1e-3)  # logits near 0 are not divided by


@pytest.mark.parametrize(
    ("theirs", "passed", "sentence"),
    [
        ([2, 0, 1], True, "the same 3 tokens"),
        ([1, 0, 1], False, "the same 0 of 3 tokens; the next token is another one"),
        ([2, 1, 1], True, "the same 1 of 3 tokens; two tokens are 0.002 apart there"),
        ([2, 0, 2], False, "the same 2 of 3 tokens"),
        ([2, 0], False, "the same 2 of 3 tokens"),
        ([2, 0, 1, 1], False, "the same 3 of 3 tokens; the next token is another one"),
    ],
)
def test_a_continuation_may_part_where_two_tokens_are_as_likely(theirs, passed, sentence):
    found = compare_greedy(theirs, reference(), "x", 5e-5)  # 0.0025 of logits up to 50
    assert found.passed == passed
    assert found.result.startswith(sentence)


def test_what_follows_the_end_of_text_does_not_count():
    assert compare_greedy([2], reference(end_of_text=0), "x", 1e-6).passed
    assert compare_greedy([2, 0, 2], reference(end_of_text=0), "x", 1e-6).passed
    assert not compare_greedy([2, 1], reference(end_of_text=0), "x", 1e-6).passed


def test_a_network_is_compared_by_its_logits_and_its_continuation():
    def score(ids: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.0, 50.0, -1.5]).expand(*ids.shape, 3)

    logits, continuation = compare_scores(score, reference(), "x", 0.2)
    assert logits.difference == 50.0
    assert not logits.passed
    assert continuation.result.startswith("the same 0 of 3 tokens")


def test_tensors_are_compared_bit_by_bit():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    assert compare_tensors(iter({"b": b, "a": a}.items()), reference(), "x").result == "2 of 2 bit-equal"
    wrong = compare_tensors(iter({"a": a.nextafter(b), "c": b}.items()), reference(), "x")
    assert not wrong.passed
    assert wrong.result == "0 of 2 bit-equal, but not a, b, c"


def test_texts_are_compared_by_their_ids():
    assert compare_texts([[1, 2], [3]], [[1, 2], [3]], "x").passed
    assert not compare_texts([[1, 2], [4]], [[1, 2], [3]], "x").passed


def flipped(content: bytearray) -> bytes:
    content[-5] ^= 1  # a bit of the last weight but one, in ln_f.bias
    return content


@pytest.mark.parametrize(
    ("tampered", "sentence"),
    [
        (
            flipped,
            r"what was exported is not model\. tensors by numpy .* 27 of 28 bit-equal, but not .*ln_f\.bias",
        ),
        (lambda content: content[:-4], "what was exported cannot be loaded again"),
    ],
    ids=["a bit", "the end"],
)
def test_nothing_is_left_of_an_export_that_differs(tmp_path, monkeypatch, tampered, sentence):
    write = llmc.write

    def write_and_tamper(model, job, folder):
        write(model, job, folder)
        path = folder / "model.bin"
        path.write_bytes(tampered(bytearray(path.read_bytes())))

    monkeypatch.setattr(llmc, "write", write_and_tamper)
    with pytest.raises(exporter.ExportMismatch, match=f"out is not written: {sentence}"):
        export(monkeypatch, tmp_path / "out", random_model(), "llmc")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_another_refused(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    export(monkeypatch, tmp_path / "empty", random_model(), "llmc")
    before = sorted(path.name for path in (tmp_path / "empty").iterdir())
    assert before == ["README.md", "certificate.json", "model.bin"]
    with pytest.raises(UserError, match="empty is there already"):
        export(monkeypatch, tmp_path / "empty", random_model(), "llmc")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        export(monkeypatch, tmp_path / "file" / "out", random_model(), "llmc")
