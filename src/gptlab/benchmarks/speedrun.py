"""suite=speedrun: whole runs to a loss; suite=ladder: what each part of their recipe is worth. Imports no torch."""

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
from gptlab.config.command import configuration_folder
from gptlab.errors import UserError

WHOLE = "nothing"  # of the parts that can be left out
# nanoGPT's character run for a CPU, as its README has it
NANOGPT = (
    *("train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20"),
    *("--log_interval=1", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128"),
    *("--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
)
NANOGPT_LOSS = re.compile(r"^step 2000: .*val loss ([0-9.]+)$", re.MULTILINE)


class _Text(NamedTuple):
    """The text, and the cache for its prepared data."""

    source: str | None
    cache: str

    @property
    def arguments(self) -> list[str]:
        """Command-line arguments of gptlab.train and gptlab.prepare."""
        named = [] if self.source is None else [f"data.source='{Path(self.source).expanduser().absolute()}'"]
        return ["data=shakespeare_char", f"data.cache_dir='{Path(self.cache).expanduser().absolute()}'", *named]


def time_to_loss(bench: SpeedrunBench, cache: str, rounds: int) -> Iterator[ResultTable]:
    """Measures whole commands, with another seed in each round.

    Raises:
        UserError: At once, if the text cannot be prepared or the checkout of nanoGPT is incomplete.
    """
    plain = [] if bench.nanogpt is None else [_nanogpt(Path(bench.nanogpt).expanduser().absolute())]
    text = _prepared(bench.source, cache)
    ways = [
        *plain,
        Variant("", "gptlab, nanoGPT's recipe", lambda seed: _run(["experiment=shakespeare_char_cpu"], seed, text)),
        Variant("", "gptlab, experiment=speedrun_cpu", lambda seed: _run(["experiment=speedrun_cpu"], seed, text)),
    ]
    caption = (
        f"Whole commands, start-up and end included, with prepared data; seeds 1 to {rounds} (nanoGPT's is always the "
        "same). Val loss of gptlab is that of the whole val split, that of nanoGPT its own estimate. Reached: share of "
        f"the runs that end at {bench.target} or below."
    )

    def parts() -> Iterator[ResultTable]:
        rows = measure_in_turns(ways, rounds)
        for row in rows:
            reached = sum(sample["val loss"] <= bench.target for sample in row.samples) / rounds
            for sample in row.samples:
                sample["reached"] = reached
        yield ResultTable("Time to a loss", caption, "runs/min", ("seconds", "val loss", "reached"), rows)

    return parts()


def ladder(bench: SpeedrunBench, cache: str, rounds: int) -> Iterator[ResultTable]:
    """Leaves out one part of the recipe after the other.

    Raises:
        UserError: At once, if the text cannot be prepared.
    """
    left_out = _parts_of_the_sweep() if bench.parts is None else bench.parts
    text = _prepared(bench.source, cache)

    def way(part: str) -> Variant:
        arguments = ["experiment=speedrun_cpu", f"without={part}", "train.eval_every=20", "callbacks=none"]

        def measure(seed: int) -> Sample:
            sample = _run(arguments, seed, text, target=bench.target)
            return {name: sample[name] for name in sample if name not in ("seconds", "runs/min")}

        return Variant("", "the whole recipe" if part == WHOLE else f"without {part.replace('_', ' ')}", measure)

    caption = (
        f"experiment=speedrun_cpu with one part left out, at equal tokens, with seeds 1 to {rounds}. The ratio is that "
        f"of the losses: above 1 is worse. Beside it the step of the first evaluation (every 20 steps) at "
        f"{bench.target} or below, and the seconds of training until there, evaluations and start-up not counted; a "
        "dash: a run did not get there."
    )

    def parts() -> Iterator[ResultTable]:
        rows = measure_in_turns([way(part) for part in (WHOLE, *left_out)], rounds)
        yield ResultTable(
            "The recipe, one part left out", caption, "val loss", ("steps to it", "s to it", "tokens/s"), rows
        )

    return parts()


def _parts_of_the_sweep() -> list[str]:
    """Returns the parts that sweeps=ladder leaves out."""
    sweep = yaml.safe_load((configuration_folder() / "sweeps/ladder.yaml").read_text(encoding="utf-8"))
    return [part for part in sweep["hydra"]["sweeper"]["params"]["without"].split(",") if part != WHOLE]


def _prepared(source: str | None, cache: str) -> _Text:
    """Prepares the text, so that no run has to."""
    text = _Text(source, cache)
    run_timed("-m", "gptlab.prepare", *text.arguments)
    return text


def _run(arguments: list[str], number: int, text: _Text, *, target: float | None = None) -> Sample:
    """Runs gptlab.train in a folder of its own; returns its duration, speed and losses."""
    with TemporaryDirectory(prefix="gptlab-bench-") as folder:
        todo = (*arguments, f"seed={number + 1}", *text.arguments[1:])
        seconds = run_timed("-m", "gptlab.train", *todo, folder=Path(folder)).seconds
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
            f"nanogpt={checkout} is no checkout of nanoGPT with data/shakespeare_char/train.bin, which its "
            "data/shakespeare_char/prepare.py makes."
        )

    def measure(_: int) -> Sample:
        run = run_timed(*NANOGPT, folder=checkout)
        (loss,) = NANOGPT_LOSS.findall(run.printed)
        return {"runs/min": 60 / run.seconds, "seconds": run.seconds, "val loss": float(loss)}

    return Variant("", "nanoGPT", measure)
