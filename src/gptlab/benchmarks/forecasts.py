"""suite=plan: forecasts of ``gptlab.plan``, compared with measured runs. Imports no torch."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from gptlab.benchmarks.config import PlanBench
from gptlab.benchmarks.measuring import ResultTable, Sample, Variant, measure_in_turns, run_timed
from gptlab.errors import UserError, did_you_mean
from gptlab.planning.calibration import measure_run
from gptlab.tracking.run_store.runs import CHECKPOINTS, Run
from gptlab.training.checkpoints.records import list_checkpoints

BASELINE = "baseline"  # variant without overrides; LoRA starts from its weights
OPTIONS = {  # of model=gpt2_modern, one by one
    "RMSNorm": "model.norm=rms",
    "rotary positions": "model.positions=rotary_half",
    "QK-norm": "model.qk_norm=true",
    "embedding norm": "model.embedding_norm=true",
    "ReLU squared": "model.activation=relu_squared",
    "soft cap": "model.logit_soft_cap=15",
    "untied head": "model.tie_weights=false",
    "value residual": "model.value_residual=true",
    "value embeddings": "model.value_embeddings=2",
    "x0 skips": "model.x0_skips=true",
    "U-Net skips": "model.unet_skips=true",
    "window": "model.attention_window=128",
}
VARIANTS = {  # overrides of each variant
    **{name: [option] for name, option in OPTIONS.items()},
    "all of these": [*OPTIONS.values()],
    "dropout": ["model.dropout=0.1"],
    "checkpointing": ["model.activation_checkpointing=true"],
    "accumulation": ["train.micro_batch_size=2"],
    "EMA": ["train.ema_decay=0.99"],
    "Muon": ["optimizer=muon"],
    "LoRA": ["lora=all"],
    "LoRA, attention": ["lora=attention"],
    "DDP 2": ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"],
    "FSDP 2": ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2"],
}
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # malloc returns freed memory
COLUMNS = ("memory ratio", "checkpoint MB", "checkpoint ratio", "s/step", "time ratio")


def compare_forecasts(bench: PlanBench, rounds: int) -> Iterator[ResultTable]:
    """Returns an iterator that plans, with a calibration, and then trains every variant.

    Raises:
        UserError: ``bench.only`` has an unknown variant. Raised by this call.
    """
    variants: dict[str, list[str]] = {BASELINE: [], **VARIANTS}
    only = variants if bench.only is None else bench.only
    if unknown := [name for name in only if name not in variants]:
        near = did_you_mean(unknown[0], variants)
        raise UserError(f"plan.only={unknown[0]} is not a variant.{near} Variants: {', '.join(variants)}.")

    def variant(folder: Path, name: str) -> Variant:
        return Variant("", name, lambda number: _measure(folder / str(number), bench, name, variants[name]))

    def parts() -> Iterator[ResultTable]:
        with TemporaryDirectory(prefix="gptlab-bench-") as folder:
            chosen = [variant(Path(folder), name) for name in variants if name == BASELINE or name in only]
            rows = measure_in_turns(chosen, rounds)
        yield ResultTable("Forecasts", _caption(bench), "MB", COLUMNS, rows, compared=False)

    return parts()


def _caption(bench: PlanBench) -> str:
    return (
        f"gptlab.train {' '.join(bench.arguments)}: measured peak memory (MB), size of a checkpoint, and time of a "
        "step, each divided by its forecast (ratio). Memory is without malloc's fragmentation: the runs have "
        f"{'='.join(*MALLOC.items())}. Time is forecast from a calibration of {bench.steps} steps."
    )


def _measure(folder: Path, bench: PlanBench, name: str, overrides: list[str]) -> Sample:
    """Plans a variant with calibrate=true, then trains it; ``folder`` is that of the round."""
    run_dir = folder / "runs" / name.replace(",", "")
    folder.mkdir(exist_ok=True)
    arguments = [
        *(*bench.arguments, f"train.max_steps={bench.steps}", f"train.eval_every={bench.steps}", "train.log_every=1"),
        *("train.eval_windows=4", "callbacks=checkpoint", f"data.cache_dir='{folder}/cache'", *overrides),
    ]
    if any(override.startswith("lora=") for override in overrides):
        arguments.append(f"init_from='{run_dir.with_name(BASELINE)}'")
    environment, file = os.environ | MALLOC, folder / "plan.json"
    planning = ("-m", "gptlab.plan", *arguments, "calibrate=true", f"json='{file}'", "overwrite=true")
    run_timed(*planning, environment=environment, folder=folder)
    plan = json.loads(file.read_text(encoding="utf-8"))
    run_timed("-m", "gptlab.train", *arguments, f"hydra.run.dir='{run_dir}'", environment=environment, folder=folder)
    run = Run(run_dir)
    memory = run.forecast["score"]["peak_memory_bytes"]["measured"]
    newest = list_checkpoints(run_dir / CHECKPOINTS)[-1]
    saved = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    found = measure_run(run.rows, seconds=0, evaluations=1, evaluated=0, peak_memory=memory, source=name)
    assert found is not None  # noqa: S101  (the run has several steps and was not resumed)
    tokens = plan["tokens"] / plan["steps"]
    return {
        "MB": memory / 1e6,
        "memory ratio": memory / (plan["memory"]["total"] - plan["memory"]["holes"]),
        "checkpoint MB": saved / 1e6,
        "checkpoint ratio": saved / plan["disk"]["checkpoint"],
        "s/step": tokens / found.tokens_per_second,
        "time ratio": plan["measured"]["tokens_per_second"] / found.tokens_per_second,
    }
