"""Comparisons of a certificate, and cleanup after an export that differs from its source."""

import json

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
from gptlab.exporters.folder import atomic_folder
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


def test_tolerance_of_logits_is_relative_to_the_largest():
    below, above = (compare_logits(difference, reference(), "x", 1e-3) for difference in (0.05, 0.0501))
    assert (below.passed, above.passed) == (True, False)
    assert below.tolerance == pytest.approx(0.05)
    assert not compare_logits(float("nan"), reference(), "x", 1e-3).passed
    small = reference(logits=torch.full((1, 2, 3), 0.1))
    assert compare_logits(0.0, small, "x", 1e-3).tolerance == pytest.approx(1e-3)  # the scale is at least 1


@pytest.mark.parametrize(
    ("theirs", "passed", "result"),
    [
        ([2, 0, 1], True, "3 of 3 tokens identical"),
        ([1, 0, 1], False, "0 of 3 tokens identical; the next token differs"),
        ([2, 1, 1], True, "1 of 3 tokens identical; the two highest logits differ by only 0.002"),
        ([2, 0, 2], False, "2 of 3 tokens identical"),
        ([2, 0], False, "2 of 3 tokens identical"),
        ([2, 0, 1, 1], False, "3 of 3 tokens identical; the next token differs"),
    ],
)
def test_greedy_continuation_may_differ_at_a_tie(theirs, passed, result):
    found = compare_greedy(theirs, reference(), "x", 5e-5)  # a tolerance of 0.0025, as the largest logit is 50
    assert found.passed == passed
    assert found.result.startswith(result)


def test_tokens_after_the_end_of_text_token_are_ignored():
    assert compare_greedy([2], reference(end_of_text=0), "x", 1e-6).passed
    assert compare_greedy([2, 0, 2], reference(end_of_text=0), "x", 1e-6).passed
    assert not compare_greedy([2, 1], reference(end_of_text=0), "x", 1e-6).passed


def test_compare_scores_compares_logits_and_continuation():
    def score(ids: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.0, 50.0, -1.5]).expand(*ids.shape, 3)

    logits, continuation = compare_scores(score, reference(), "x", 0.2)
    assert logits.difference == 50.0
    assert not logits.passed
    assert continuation.result.startswith("0 of 3 tokens identical")


def test_tensors_are_compared_bit_by_bit():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    assert compare_tensors(iter({"b": b, "a": a}.items()), reference(), "x").result == "2 of 2 bit-identical"
    wrong = compare_tensors(iter({"a": a.nextafter(b), "c": b}.items()), reference(), "x")
    assert not wrong.passed
    assert wrong.result == "0 of 2 bit-identical, but not a, b, c"


def test_texts_are_compared_by_their_token_ids():
    assert compare_texts([[1, 2], [3]], [[1, 2], [3]], "x").passed
    assert not compare_texts([[1, 2], [4]], [[1, 2], [3]], "x").passed


def flipped(content: bytearray) -> bytes:
    content[-5] ^= 1  # a bit of the second to last weight, in ln_f.bias
    return content


@pytest.mark.parametrize(
    ("tampered", "message"),
    [
        (
            flipped,
            r"differs from model: tensors by numpy .* 27 of 28 bit-identical, but not .*ln_f\.bias",
        ),
        (lambda content: content[:-4], "cannot be loaded"),
    ],
    ids=["a bit", "the end"],
)
def test_export_that_differs_leaves_no_files(tmp_path, monkeypatch, tampered, message):
    write = llmc.write

    def write_and_tamper(model, job, folder):
        write(model, job, folder)
        path = folder / "model.bin"
        path.write_bytes(tampered(bytearray(path.read_bytes())))

    monkeypatch.setattr(llmc, "write", write_and_tamper)
    with pytest.raises(exporter.ExportMismatch, match=f"out was not written, because the export {message}"):
        export(monkeypatch, tmp_path / "out", random_model(), "llmc")
    assert list(tmp_path.iterdir()) == []


def test_an_export_may_be_written_to_an_empty_directory_and_again(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    export(monkeypatch, tmp_path / "empty", random_model(), "llmc")
    before = sorted(path.name for path in (tmp_path / "empty").iterdir())
    assert before == ["README.md", "certificate.json", "model.bin"]
    for _ in range(2):
        export(monkeypatch, tmp_path / "empty", random_model(), "llmc")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be created"):
        export(monkeypatch, tmp_path / "file" / "out", random_model(), "llmc")


def test_a_weight_that_float16_cannot_hold_is_named(tmp_path, monkeypatch):
    model = random_model(activation="gelu_tanh")
    model.h[1].mlp.c_fc.weight[3, 2] = 65_520.0
    with pytest.raises(UserError, match=r"dtype=float16 cannot hold .*h\.1\.mlp\.c_fc\.weight .* 65,520.*is 65,504"):
        export(monkeypatch, tmp_path / "out", model, "hf", "float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("listed", [3, [None, 7], ["../kept"], {"a": 1}], ids=str)
def test_a_certificate_of_somebody_else_removes_nothing_outside(tmp_path, listed):
    (out := tmp_path / "out").mkdir()
    (tmp_path / "kept").touch()
    (out / "certificate.json").write_text(json.dumps({"gptlab": "1", "files": listed}))
    with atomic_folder(out) as folder:
        (folder / "certificate.json").write_text("{}")
    assert [path.name for path in out.iterdir()] == ["certificate.json"]
    assert (tmp_path / "kept").exists()
