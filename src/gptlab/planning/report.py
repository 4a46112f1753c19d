"""Report of a plan: prints its tables. Imports no torch."""

from datetime import timedelta

from rich.text import Text

from gptlab.data.repetition import count_epochs, repetition_warning
from gptlab.model.config import flops_per_token, parameter_count
from gptlab.planning.budget import TOKENS_PER_PARAMETER, ComputeOptimalChoice
from gptlab.planning.costs import TimeEstimate
from gptlab.planning.plans import RunPlan
from gptlab.tables import FittingTable, key_value_table, print_table
from gptlab.terminal import get_console, print_message

SMALL = 50e6  # parameters; the kernels of a smaller model do not fill a GPU
KINDS = {
    "libraries": "Python and libraries",
    "weights": "weights",
    "gradients": "gradients",
    "moments": "optimizer state",
    "copies": "copies of weights",
    "activations": "activations",
    "logits": "logits and loss",
    "holes": "malloc fragmentation",
    "buffers": "buffers",
}


def print_plan(plan: RunPlan) -> None:
    """Prints the tables of a plan."""
    for table in (_run(plan), _memory(plan), _spreads(plan), _times(plan)):
        print_table(table)
    if caveats := _caveats(plan):
        get_console().print(Text(caveats, "dim"))
    if plan.manifest is not None and (warning := repetition_warning(plan.length.tokens, plan.manifest)):
        get_console().print(Text(warning, "yellow"))


def print_choice(choice: ComputeOptimalChoice, command: str) -> None:
    """Prints the overrides that were chosen for a budget, their sources, and the command of the run."""
    console = get_console()
    table = FittingTable("compute-optimal run")
    table.add_column("config key")
    table.add_column("value", "right")
    table.add_column("source", wraps=True)
    for override in choice.overrides:
        key, _, value = override.partition("=")
        table.add_row(key, value, _source(key))
    print_table(table)
    console.print("Command:", style="bold")
    print_message(command)  # not wrapped or colored, so that it can be copied


def format_bytes(number: float) -> str:
    """Formats a number of bytes with a decimal unit: "3.07 GB"."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:,.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"
    return f"{number:.0f} B"


def format_duration(seconds: float) -> str:
    """Formats a duration: "7.2 s", "1:02:03" or "7.5 days"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 3 * 86400:
        return str(timedelta(seconds=round(seconds)))
    return f"{seconds / 86400:,.1f} days"


def _run(plan: RunPlan) -> FittingTable:
    model, length, train = plan.config.model, plan.length, plan.config.train
    count = parameter_count(model)
    factors = f"{plan.spread.copies} x {train.global_batch_size // plan.batch // plan.spread.copies} x {plan.batch}"
    best = TOKENS_PER_PARAMETER * count
    rows = {
        "parameters": f"{sum(plan.parameters.values()):,}: "
        f"{', '.join(f'{name} {number:,}' for name, number in plan.parameters.items())}"
        f"{'; only lora is trained' if plan.config.lora else ''}",
        "FLOPs per token": f"{flops_per_token(model, plan.config.lora):.4g}, forward and backward "
        "(Chowdhery et al. 2022, appendix B)",
        "steps": f"{length.steps:,} of {train.global_batch_size} sequences of {model.block_size} tokens: {factors} "
        "(devices x gradient accumulation x micro-batch)",
        "tokens": f"{length.tokens:,}{_epochs(plan)}",
        "per parameter": f"{plan.tokens_per_parameter:.3g} tokens; compute-optimal: about {TOKENS_PER_PARAMETER}, "
        f"{best:.3g} tokens in total (Hoffmann et al. 2022)",
        "FLOPs": f"{plan.flops:.3g}",
        "evaluations": f"{length.evaluations}, each on {f'{length.evaluated:,}' if length.evaluated else 'all'} tokens",
        "data": f"{format_bytes(plan.disk.data)} of tokens"
        + ("" if plan.manifest else ", estimated from the length of the run, because the corpus is not prepared"),
        "checkpoints": _checkpoints(plan),
    }
    return key_value_table(rows.items(), "run")


def _epochs(plan: RunPlan) -> str:
    if plan.manifest is None:
        return ""
    return f", {count_epochs(plan.length.tokens, plan.manifest):,.3g} epochs of {plan.manifest.origin}"


def _checkpoints(plan: RunPlan) -> str:
    if not plan.disk.kept:
        return "none"
    return f"{format_bytes(plan.disk.checkpoint)} each, up to {format_bytes(plan.disk.kept)} in total"


def _memory(plan: RunPlan) -> FittingTable:
    hardware, chunk = plan.hardware, plan.config.loss_chunk(plan.hardware)
    compiled = {False: "not compiled", "whole": "compiled", "blocks": "compiled block by block"}[hardware.compile]
    title = f"peak memory of a device, {plan.memory.moment}: {hardware.name}; {hardware.precision}, {compiled}"
    rows = {
        name: format_bytes(number)
        for key, name in KINDS.items()
        if (number := getattr(plan.memory, key)) or key not in ("buffers", "holes")
    }
    rows["total"] = f"{format_bytes(plan.memory.total)}{_of_all(plan)}"
    if plan.measured is not None:
        rows["measured"] = f"{format_bytes(plan.measured.peak_memory_bytes)}, {plan.measured.source}"
    if plan.largest is not None:
        room = format_bytes(hardware.memory or 0)
        largest = f"up to {plan.largest} fit" if plan.largest else "even 1 does not fit"
        logits = f", with the logits computed for {chunk:,} tokens at a time" if chunk else ""
        rows["micro-batch"] = f"{largest} in {room}{logits}"
    else:
        rows["micro-batch"] = f"unknown: {hardware.name} is not in the table of GPUs. Set gpu=<name> to plan for a GPU."
    return key_value_table(rows.items(), title)


def _of_all(plan: RunPlan) -> str:
    room = plan.hardware.memory
    return f" of {format_bytes(room)}" if room else ""


def _spreads(plan: RunPlan) -> FittingTable:
    table = FittingTable(
        "parallel layouts: peak memory per device, and traffic per device and step", see_also="json=<file> has all."
    )
    table.add_column("strategy")
    table.add_column("devices", "right")
    table.add_column("micro-batch", "right", drop_order=4)
    table.add_column("memory", "right")
    table.add_column("checkpointed memory", "right", drop_order=3)
    table.add_column("memory at full logits", "right", drop_order=2)
    table.add_column("traffic", drop_order=1)
    for way in plan.alternatives:
        spread = way.spread
        network = f", {format_step(way.network)}" if way.network else ""
        split = f" (tp={spread.split})" if spread.split > 1 else ""
        table.add_row(
            f"{spread.strategy}{split}",
            str(spread.devices),
            str(way.batch),
            *map(format_bytes, (way.total, way.checkpointed, way.whole_logits)),
            format_bytes(way.traffic) + network,
        )
    return table


def _times(plan: RunPlan) -> FittingTable:
    table = FittingTable("time")
    table.add_column("device")
    table.add_column("tokens/s", "right", drop_order=1)
    table.add_column("time", "right")
    table.add_column("source", wraps=True)
    for time in plan.times:
        duration = format_duration(time.seconds)
        table.add_row(time.what, f"{time.tokens_per_second:,.0f}", duration, time_source(time))
    if plan.measured is None and plan.hardware.is_local:
        table.add_row(plan.hardware.name, "?", "?", "not calibrated: set calibrate=true, or train a similar run")
    return table


def _caveats(plan: RunPlan) -> str:
    """Describes what the forecast times depend on."""
    caveats = [_network(plan)] if plan.traffic else []
    if parameter_count(plan.config.model) < SMALL:
        caveats.append("A model this small reaches a lower MFU on a GPU, because kernel launches limit its speed.")
    return " ".join(caveats)


def time_source(time: TimeEstimate) -> str:
    """Returns the source of a forecast duration, and how the time of the network is counted in it."""
    computing, network = time.step_computing or 0, time.step_network or 0
    match time.network:
        case "excluded":
            return f"computing alone: {time.why}, {format_step(computing)} per step"
        case "overlapped":
            return f"overlapped: max({format_step(computing)}, {format_step(network)} of network) per step; {time.why}"
        case "sequential":
            return f"not overlapped: {format_step(computing)} + {format_step(network)} of network per step"
    return time.why


def format_step(seconds: float) -> str:
    """Formats the duration of a part of a step: "0.249 s" or "2.5 ms"."""
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


def _network(plan: RunPlan) -> str:
    """Describes the traffic of a step and the bandwidth, and how to include them in times that do not."""
    sent = f"Each device sends {format_bytes(plan.traffic)} per step"
    if plan.bandwidth is not None:
        source = f", the peak of NVLink of {plan.hardware.name}"
        is_peak = plan.bandwidth == plan.hardware.link_bandwidth
        sent = f"{sent}, at {plan.bandwidth / 1e9:g} GB/s{source if is_peak else ''}"
    if any(time.network == "excluded" for time in plan.times):
        return f"{sent}. The time of computing alone does not include it: set network_bandwidth=<GB/s per device>."
    return f"{sent}."


def _source(key: str) -> str:
    if key.startswith("model."):
        return "GPT-2 shape closest to 20 tokens per parameter (Hoffmann et al. 2022)"
    if key == "train.max_steps":
        return "budget / FLOPs per step"
    if key in ("train.global_batch_size", "optimizer.lr"):
        return "Bi et al. 2024 (DeepSeek LLM), section 3.1"
    if key == "train.micro_batch_size":
        return "largest divisor of the batch per device that fits"
    return "required by the other values"
