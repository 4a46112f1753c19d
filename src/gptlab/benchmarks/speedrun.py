"""suite=speedrun: time of whole runs to a target loss; suite=ladder: ablation of the recipe. Imports no torch."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import yaml

from gptlab.benchmarks.config import SpeedrunBench
from gptlab.benchmarks.measuring import ResultTable, Sample, Variant, measure_in_turns, run_timed
from gptlab.config.search_path import configuration_folder
from gptlab.errors import UserError

WHOLE = "nothing"  # option of `without` that omits no part
# nanoGPT's character-level run on a CPU, from its README
NANOGPT = (
    *("train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20"),
    *("--log_interval=1", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128"),
    *("--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
)
NANOGPT_LOSS = re.compile(r"^step 2000: .*val loss ([0-9.]+)$", re.MULTILINE)


class _Text(NamedTuple):
    """Text file, and the cache directory for its prepared data."""

    source: str | None
    cache: str

    @property
    def arguments(self) -> list[str]:
        """Command-line arguments of gptlab.train and gptlab.prepare."""
        source = [] if self.source is None else [f"data.source='{Path(self.source).expanduser().absolute()}'"]
        return ["data=shakespeare_char", f"data.cache_dir='{Path(self.cache).expanduser().absolute()}'", *source]


def time_to_loss(bench: SpeedrunBench, cache: str, rounds: int) -> Iterator[ResultTable]:
    """Returns an iterator that measures commands from start to exit, with a different seed in each round.

    Raises:
        UserError: The text cannot be prepared, or the checkout of nanoGPT is incomplete. Raised by this call.
    """
    plain = [] if bench.nanogpt is None else [_nanogpt(Path(bench.nanogpt).expanduser().absolute())]
    text = _prepared(bench.source, cache)
    variants = [
        *plain,
        Variant("", "gptlab, nanoGPT recipe", lambda seed: _run(["experiment=shakespeare_char_cpu"], seed, text)),
        Variant("", "gptlab, experiment=speedrun_cpu", lambda seed: _run(["experiment=speedrun_cpu"], seed, text)),
    ]
    caption = (
        f"Whole commands, including start-up, with prepared data; seeds 1 to {rounds} (nanoGPT: always the same seed). "
        "The val loss of gptlab is computed on the whole val split, that of nanoGPT is its own estimate. Reached: "
        f"fraction of runs with a final val loss of at most {bench.target}."
    )

    def parts() -> Iterator[ResultTable]:
        rows = measure_in_turns(variants, rounds)
        for row in rows:
            reached = sum(sample["val loss"] <= bench.target for sample in row.samples) / rounds
            for sample in row.samples:
                sample["reached"] = reached
        yield ResultTable("Time to target loss", caption, "runs/min", ("seconds", "val loss", "reached"), rows)

    return parts()


def ladder(bench: SpeedrunBench, cache: str, rounds: int) -> Iterator[ResultTable]:
    """Returns an iterator that measures the recipe and the recipe without each of its parts.

    Raises:
        UserError: The text cannot be prepared. Raised by this call.
    """
    omitted = _ladder_parts() if bench.parts is None else bench.parts
    text = _prepared(bench.source, cache)

    def variant(part: str) -> Variant:
        arguments = ["experiment=speedrun_cpu", f"without={part}", "train.eval_every=20", "callbacks=none"]

        def measure(seed: int) -> Sample:
            sample = _run(arguments, seed, text, target=bench.target)
            return {name: sample[name] for name in sample if name not in ("seconds", "runs/min")}

        return Variant("", "full recipe" if part == WHOLE else f"without {part.replace('_', ' ')}", measure)

    caption = (
        f"experiment=speedrun_cpu with one part omitted, at equal tokens, with seeds 1 to {rounds}. Ratio: of the val "
        f"losses; above 1 is worse. Target: the first evaluation (every 20 steps) with a val loss of at most "
        f"{bench.target}; seconds of training, without evaluations and start-up. A dash: not all runs reached the "
        "target."
    )

    def parts() -> Iterator[ResultTable]:
        rows = measure_in_turns([variant(part) for part in (WHOLE, *omitted)], rounds)
        yield ResultTable(
            "Ablation of the speedrun recipe", caption, "val loss", ("steps to it", "s to it", "tokens/s"), rows
        )

    return parts()


def _ladder_parts() -> list[str]:
    """Returns the parts of the recipe that sweeps=ladder omits."""
    sweep = yaml.safe_load((configuration_folder() / "sweeps/ladder.yaml").read_text(encoding="utf-8"))
    return [part for part in sweep["hydra"]["sweeper"]["params"]["without"].split(",") if part != WHOLE]


def _prepared(source: str | None, cache: str) -> _Text:
    """Prepares the text before the runs, so that their time does not include the preparation."""
    text = _Text(source, cache)
    run_timed("-m", "gptlab.prepare", *text.arguments)
    return text


def _run(arguments: list[str], number: int, text: _Text, *, target: float | None = None) -> Sample:
    """Runs gptlab.train in a temporary directory; returns its duration, speed and losses."""
    with TemporaryDirectory(prefix="gptlab-bench-") as folder:
        overrides = (*arguments, f"seed={number + 1}", *text.arguments[1:])
        seconds = run_timed("-m", "gptlab.train", *overrides, folder=Path(folder)).seconds
        (metrics,) = Path(folder).glob("outputs/*/*/metrics.csv")
        with metrics.open(newline="") as file:
            rows = list(csv.DictReader(file))
    losses = {int(row["step"]): float(row["val/loss"]) for row in rows if row.get("val/loss")}
    speeds = {int(row["step"]): float(row["tokens_per_second"]) for row in rows if row.get("tokens_per_second")}
    tokens = {int(row["step"]): float(row["tokens"]) for row in rows}
    sample = {"runs/min": 60 / seconds, "seconds": seconds, "val loss": losses[max(losses)]}
    sample["tokens/s"] = median(speeds.values())
    reached = [step for step, loss in losses.items() if target is not None and loss <= target]
    if reached:
        steps = sorted(step for step in speeds if step <= min(reached))
        spans = zip([0, *steps], steps, strict=False)
        sample["steps to it"] = min(reached)
        sample["s to it"] = sum((tokens[b] - tokens.get(a, 0)) / speeds[b] for a, b in spans)
    return sample


def _nanogpt(checkout: Path) -> Variant:
    """Returns the variant that runs nanoGPT's command in its checkout."""
    if not (checkout / "data/shakespeare_char/train.bin").is_file():
        raise UserError(
            f"speedrun.nanogpt={checkout} is not a checkout of nanoGPT with data/shakespeare_char/train.bin. Run its "
            "data/shakespeare_char/prepare.py first."
        )

    def measure(_: int) -> Sample:
        run = run_timed(*NANOGPT, folder=checkout)
        (loss,) = NANOGPT_LOSS.findall(run.printed)
        return {"runs/min": 60 / run.seconds, "seconds": run.seconds, "val loss": float(loss)}

    return Variant("", "nanoGPT", measure)
