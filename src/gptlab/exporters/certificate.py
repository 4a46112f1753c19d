"""Certificate of an export: its comparisons with the reference, and their results."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from gptlab.exporters.reference import Reference, ScoreFunction, greedy_continuation, tensor_hash

CERTIFICATE = "certificate.json"


class Check(NamedTuple):
    """One comparison of an export with the reference.

    Attributes:
        what: Was compared.
        by: The library that read or ran the export, with its version.
        result: In words.
        passed: Whether it is what it should be.
        difference: Largest absolute one, where there is such.
        tolerance: That it may have.
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
        about: The source, the format and the type of the weights.
        reference: What was compared with.
        checks: In order.
        unchecked: What was not compared, each with the reason.
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
        """One a comparison, for people."""
        done = [f"{check.what} by {check.by}: {check.result}" for check in self.checks]
        rounded = self.reference.rounding
        told = (
            []
            if rounded is None
            else [f"storing in {self.about['dtype']} itself moves the logits by up to {rounded:.2g}"]
        )
        return done + [f"not checked: {text}" for text in self.unchecked] + told

    def save(self, folder: Path) -> None:
        """Writes certificate.json."""
        reference = self.reference
        values = {
            **self.about,
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
        text = re.sub(r"\n\s+(?=[\d\]])", " ", json.dumps(values, indent=2))  # a list of numbers in one line
        (folder / CERTIFICATE).write_text(text + "\n", encoding="utf-8")


def version(package: str) -> str:
    """Returns a package's name and version."""
    return f"{package} {metadata.version(package)}"


def compare_scores(score: ScoreFunction, reference: Reference, by: str, relative: float) -> list[Check]:
    """Compares logits and the greedy continuation with those of the exported model.

    Args:
        score: Of the exported model.
        reference: Ours.
        by: Who runs it.
        relative: Largest difference of logits, in parts of the largest logit.
    """
    difference = (score(reference.prompts) - reference.logits).abs().max().item()
    theirs = greedy_continuation(score, reference.beginning, len(reference.greedy.ids)).ids
    return [
        compare_logits(difference, reference, by, relative),
        compare_greedy(theirs, reference, by, relative),
    ]


def compare_logits(difference: float, reference: Reference, by: str, relative: float, *, of: str = "logits") -> Check:
    """Checks the largest difference of logits, or of what ``of`` names."""
    tolerance = relative * reference.scale
    shape = "x".join(map(str, reference.prompts.shape))
    where = f"prompts of {shape} tokens, whose logits reach {reference.scale:.3g}"
    result = f"largest difference {difference:.2g}, {tolerance:.2g} allowed; {where}"
    return Check(of, by, result, difference <= tolerance, difference, tolerance)


def compare_greedy(theirs: Sequence[int], reference: Reference, by: str, relative: float) -> Check:
    """Checks a greedy continuation.

    It may part from ours where two tokens were as likely as each other, within twice the tolerance of a logit.
    """
    ids = _until(reference.greedy.ids, reference.end_of_text)
    other = _until(theirs, reference.end_of_text)
    at = next(
        (i for i, (one, two) in enumerate(zip(ids, other, strict=False)) if one != two), min(len(ids), len(other))
    )
    what = f"greedy continuation of {len(reference.beginning)} tokens"
    if ids == other:
        return Check(what, by, f"the same {len(ids)} tokens", passed=True)
    margin = reference.greedy.margins[at] if at < len(ids) else None
    tied = margin is not None and margin <= 2 * relative * reference.scale
    why = f"two tokens are {margin:.1g} apart there" if tied else "the next token is another one"
    return Check(what, by, f"the same {at} of {len(ids)} tokens; {why}", passed=tied)


def compare_tensors(theirs: Iterator[tuple[str, Tensor]], reference: Reference, by: str) -> Check:
    """Compares the tensors that a library reads from the file with the reference, bit by bit.

    Args:
        theirs: By the names and in the orientation of nanoGPT, as they are stored, one after the other.
        reference: Ours.
        by: Who reads them.
    """
    found = {name: tensor_hash(tensor) for name, tensor in theirs}
    wrong = sorted(
        name for name in reference.tensors.keys() | found.keys() if found.get(name) != reference.tensors.get(name)
    )
    right = len(reference.tensors.keys() - set(wrong))
    result = f"{right} of {len(reference.tensors)} bit-equal"
    named = f", but not {', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}" if wrong else ""
    return Check("tensors", by, result + named, passed=not wrong)


def compare_texts(theirs: Sequence[Sequence[int]], ours: Sequence[Sequence[int]], by: str) -> Check:
    """Compares two tokenizers on some texts."""
    right = sum(list(one) == list(two) for one, two in zip(theirs, ours, strict=True))
    tokens = sum(len(ids) for ids in ours)
    return Check("tokenizer", by, f"the same ids of {right} of {len(ours)} texts ({tokens} tokens)", right == len(ours))


def _until(ids: Sequence[int], end: int | None) -> list[int]:
    """Returns the ids before the end of text."""
    cut = list(ids)
    return cut[: cut.index(end)] if end in cut else cut
