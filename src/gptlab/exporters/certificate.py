"""Certificate of an export: the comparisons with the reference and their results."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from gptlab.exporters.folder import CERTIFICATE
from gptlab.exporters.reference import Reference, ScoreFunction, greedy_continuation, tensor_hash


class Check(NamedTuple):
    """One comparison of an export with the reference.

    Attributes:
        what: Name of the compared quantity.
        by: Name and version of the library that read or ran the export.
        result: Human-readable result.
        passed: Whether the comparison succeeded.
        difference: Largest absolute difference, if the comparison is numeric.
        tolerance: Largest allowed difference, if the comparison is numeric.
    """

    what: str
    by: str
    result: str
    passed: bool
    difference: float | None = None
    tolerance: float | None = None


class Certificate(NamedTuple):
    """All comparisons of an export.

    Attributes:
        about: The gptlab version, the model, the format and the dtype.
        reference: Reference of the comparisons.
        checks: Comparisons, in order.
        unchecked: Quantities that were not compared, each with the reason.
    """

    about: Mapping[str, Any]
    reference: Reference
    checks: Sequence[Check]
    unchecked: Sequence[str]

    @property
    def failed(self) -> list[Check]:
        """Failed comparisons."""
        return [check for check in self.checks if not check.passed]

    def lines(self) -> list[str]:
        """Returns human-readable lines, one per comparison."""
        done = [f"{check.what} by {check.by}: {check.result}" for check in self.checks]
        rounding = self.reference.rounding
        effect = (
            []
            if rounding is None
            else [f"rounding the weights to {self.about['dtype']} changes the logits by up to {rounding:.2g}"]
        )
        return done + [f"not checked: {text}" for text in self.unchecked] + effect

    def save(self, folder: Path) -> None:
        """Writes certificate.json, which lists the files of the export; called when they are written."""
        reference = self.reference
        values = {
            **self.about,
            "files": sorted(file.name for file in folder.iterdir()),
            "passed": not self.failed,
            "checks": [check._asdict() for check in self.checks],
            "not_checked": list(self.unchecked),
            "reference": {
                "prompts": reference.prompts.tolist(),
                "largest_logit": reference.logits.abs().max().item(),
                "rounding": reference.rounding,
                "beginning": reference.beginning,
                "greedy": reference.greedy.ids,
                "tensors_sha256": reference.tensors,
            },
        }
        text = re.sub(r"\n\s+(?=[\d\]])", " ", json.dumps(values, indent=2))  # lists of numbers on one line
        (folder / CERTIFICATE).write_text(text + "\n", encoding="utf-8")


def version(package: str) -> str:
    """Returns the name and version of a package."""
    return f"{package} {metadata.version(package)}"


def compare_scores(score: ScoreFunction, reference: Reference, by: str, relative: float) -> list[Check]:
    """Compares the logits and the greedy continuation of an exported model with the reference.

    Args:
        score: Returns the logits of the exported model.
        reference: Reference of the comparison.
        by: Library that runs the exported model.
        relative: Tolerance of the logits, relative to the largest logit.
    """
    difference = (score(reference.prompts) - reference.logits).abs().max().item()
    theirs = greedy_continuation(score, reference.beginning, len(reference.greedy.ids)).ids
    return [
        compare_logits(difference, reference, by, relative),
        compare_greedy(theirs, reference, by, relative),
    ]


def compare_logits(difference: float, reference: Reference, by: str, relative: float, *, of: str = "logits") -> Check:
    """Checks the largest difference of the logits, or of the quantity ``of``, against its tolerance."""
    tolerance = relative * reference.scale
    shape = "x".join(map(str, reference.prompts.shape))
    where = f"prompts of {shape} tokens, largest logit {reference.scale:.3g}"
    result = f"largest difference {difference:.2g}, tolerance {tolerance:.2g} ({where})"
    return Check(of, by, result, difference <= tolerance, difference, tolerance)


def compare_greedy(theirs: Sequence[int], reference: Reference, by: str, relative: float) -> Check:
    """Compares a greedy continuation with the reference.

    A difference is accepted if the two highest logits of the reference differ by at most twice the tolerance at the
    first token that differs.
    """
    ids = _until(reference.greedy.ids, reference.end_of_text)
    other = _until(theirs, reference.end_of_text)
    at = next(
        (i for i, (one, two) in enumerate(zip(ids, other, strict=False)) if one != two), min(len(ids), len(other))
    )
    what = f"greedy continuation of a prompt of {len(reference.beginning)} tokens"
    if ids == other:
        return Check(what, by, f"{len(ids)} of {len(ids)} tokens identical", passed=True)
    margin = reference.greedy.margins[at] if at < len(ids) else None
    tied = margin is not None and margin <= 2 * relative * reference.scale
    reason = f"the two highest logits differ by only {margin:.1g}" if tied else "the next token differs"
    return Check(what, by, f"{at} of {len(ids)} tokens identical; {reason}", passed=tied)


def compare_tensors(theirs: Iterator[tuple[str, Tensor]], reference: Reference, by: str) -> Check:
    """Compares the tensors that a library reads from the export with the reference, bit by bit.

    Args:
        theirs: Tensors of the export in their stored dtype, with the names and in the orientation of nanoGPT.
        reference: Reference of the comparison.
        by: Library that reads the tensors.
    """
    found = {name: tensor_hash(tensor) for name, tensor in theirs}
    wrong = sorted(
        name for name in reference.tensors.keys() | found.keys() if found.get(name) != reference.tensors.get(name)
    )
    right = len(reference.tensors.keys() - set(wrong))
    result = f"{right} of {len(reference.tensors)} bit-identical"
    names = f", but not {', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}" if wrong else ""
    return Check("tensors", by, result + names, passed=not wrong)


def compare_texts(theirs: Sequence[Sequence[int]], ours: Sequence[Sequence[int]], by: str) -> Check:
    """Compares the token IDs of several texts."""
    right = sum(list(one) == list(two) for one, two in zip(theirs, ours, strict=True))
    tokens = sum(len(ids) for ids in ours)
    result = f"token IDs of {right} of {len(ours)} texts identical ({tokens} tokens)"
    return Check("tokenizer", by, result, right == len(ours))


def _until(ids: Sequence[int], end: int | None) -> list[int]:
    """Returns the token IDs before the first end-of-text token."""
    cut = list(ids)
    return cut[: cut.index(end)] if end in cut else cut
