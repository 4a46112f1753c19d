"""Prints a plan. Imports no torch."""

from collections.abc import Iterable
from datetime import timedelta

from rich import box, get_console
from rich.table import Table

from gptlab.model.config import flops_per_token, parameter_count
from gptlab.planning.budget import TOKENS_PER_PARAMETER, ComputeOptimalChoice
from gptlab.planning.plans import RunPlan
from gptlab.training.hardware import resolve_loss_chunk

SMALL = 50e6  # parameters of a model whose kernels do not fill a GPU
KINDS = {
    "libraries": "python and libraries",
    "weights": "weights",
    "gradients": "gradients",
    "moments": "moments",
    "copies": "copies of weights",
    "activations": "activations",
    "logits": "logits and loss",
    "holes": "holes of malloc",
    "buffers": "buffers",
}


def print_plan(plan: RunPlan) -> None:
    """Prints the tables of a plan."""
    console = get_console()
    console.print(_run(plan))
    console.print(_memory(plan))
    console.print(_spreads(plan))
    console.print(_times(plan))


def print_choice(choice: ComputeOptimalChoice, command: str) -> None:
    """Prints what was chosen for a budget, why, and the command that runs it."""
    console = get_console()
    table = _table("what was chosen", ("", "", "by"))
    for override in choice.overrides:
        key, _, value = override.partition("=")
        table.add_row(key, value, _source(key))
    console.print(table)
    console.print("The command:", style="bold")
    print(command)  # for copying: neither wrapped nor colored


def format_bytes(number: float) -> str:
    """Formats bytes with a unit, in powers of 1000."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:,.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"
    return f"{number:.0f} B"


def format_duration(seconds: float) -> str:
    """Formats a duration."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 3 * 86400:
        return str(timedelta(seconds=round(seconds)))
    return f"{seconds / 86400:,.1f} days"


def _run(plan: RunPlan) -> Table:
    model, done, train = plan.config.model, plan.length, plan.config.train
    count = parameter_count(model)
    dealt = f"{plan.spread.copies} x {train.global_batch_size // plan.batch // plan.spread.copies} x {plan.batch}"
    best = TOKENS_PER_PARAMETER * count
    rows = {
        "parameters": f"{count:,}: {', '.join(f'{name} {number:,}' for name, number in plan.parameters.items())}",
        "FLOPs a token": f"{flops_per_token(model):.4g}, forward and backward (Chowdhery et al. 2022, appendix B)",
        "steps": f"{done.steps:,} of {train.global_batch_size} sequences of {model.block_size}: {dealt} "
        "(devices x accumulated x at once)",
        "tokens": f"{done.tokens:,}{_epochs(plan)}",
        "per parameter": f"{plan.tokens_per_parameter:.3g} tokens; compute-optimal are about {TOKENS_PER_PARAMETER}, "
        f"{best:.3g} tokens (Hoffmann et al. 2022)",
        "FLOPs": f"{plan.flops:.3g}",
        "evaluations": f"{done.evaluations} of {f'{done.evaluated:,}' if done.evaluated else 'all'} tokens",
        "data": f"{format_bytes(plan.disk.data)} of tokens"
        + ("" if plan.manifest else ", if it has as many: it is not prepared"),
        "checkpoints": _checkpoints(plan),
    }
    return _pairs("run", rows)


def _epochs(plan: RunPlan) -> str:
    if plan.manifest is None:
        return ""
    return f", {plan.length.tokens / plan.manifest.tokens('train'):.3g} epochs of {plan.manifest.origin}"


def _checkpoints(plan: RunPlan) -> str:
    if not plan.disk.kept:
        return "none"
    return (
        f"{format_bytes(plan.disk.checkpoint)} each; {format_bytes(plan.disk.kept)} with all that are there at a time"
    )


def _memory(plan: RunPlan) -> Table:
    hardware, chunk = plan.hardware, resolve_loss_chunk(plan.config.train.loss_chunk, plan.config.model)
    compiled = {False: "not compiled", "whole": "compiled", "blocks": "compiled block by block"}[hardware.compile]
    title = (
        f"memory of a device at its fullest, {plan.memory.moment}: {hardware.name}; {hardware.precision}, {compiled}"
    )
    rows = {
        name: format_bytes(number)
        for key, name in KINDS.items()
        if (number := getattr(plan.memory, key)) or key not in ("buffers", "holes")
    }
    rows["together"] = f"{format_bytes(plan.memory.total)}{_of_all(plan)}"
    if plan.measured is not None:
        rows["measured"] = f"{format_bytes(plan.measured.peak_memory_bytes)}, {plan.measured.source}"
    if plan.largest is not None:
        room = format_bytes(hardware.memory or 0)
        largest = f"at most {plan.largest} at once" if plan.largest else "not one at once"
        rows["sequences"] = f"{largest} in {room}" + (f", logits of {chunk:,} tokens at a time" if chunk else "")
    else:
        rows["sequences"] = f"{hardware.name} is not in the table of GPUs: gpu=<name> plans for one that is"
    return _pairs(title, rows)


def _of_all(plan: RunPlan) -> str:
    room = plan.hardware.memory
    return f" of {format_bytes(room)}" if room else ""


def _spreads(plan: RunPlan) -> Table:
    table = _table(
        "spread over devices: memory of each, and what it sends in a step",
        ("", "devices", "at once", "memory", "checkpointed", "all logits at once", "sent"),
    )
    for way in plan.alternatives:
        spread = way.spread
        split = f", {spread.split} a block" if spread.split > 1 else ""
        table.add_row(
            f"{spread.strategy}{split}",
            str(spread.devices),
            str(way.batch),
            *map(format_bytes, (way.total, way.checkpointed, way.whole_logits, way.traffic)),
        )
    return table


def _times(plan: RunPlan) -> Table:
    table = _table("time", ("on", "tokens/s", "time", ""))
    for time in plan.times:
        table.add_row(time.what, f"{time.tokens_per_second:,.0f}", format_duration(time.seconds), time.why)
    if plan.measured is None and plan.hardware.is_local:
        table.add_row(
            plan.hardware.name, "?", "?", "not calibrated here: calibrate=true does that, and any run of this shape"
        )
    if parameter_count(plan.config.model) < SMALL:
        table.caption = "So small a model reaches less of a GPU's peak: it waits for the next kernel most of the time."
    return table


def _source(key: str) -> str:
    if key.startswith("model."):
        return "GPT-2's shapes, the one nearest to 20 tokens a parameter (Hoffmann et al. 2022)"
    if key == "train.max_steps":
        return "what the budget leaves"
    if key in ("train.global_batch_size", "optimizer.lr"):
        return "Bi et al. 2024 (DeepSeek LLM), section 3.1"
    if key == "train.micro_batch_size":
        return "what fits"
    return "follows"


def _pairs(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows.items():
        table.add_row(*row)
    return table


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    table.columns[-1].justify = "left"
    return table
