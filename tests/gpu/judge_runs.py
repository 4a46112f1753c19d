"""Judges the runs of check.sh: python judge_runs.py <directory of the runs> <1 or 2> [name ...].

Prints a line with PASS, FAIL or INFO for each check. With names, only those runs are judged.
"""

import csv
import json
import statistics
import sys
from pathlib import Path

WORK, PART, ONLY = Path(), "1", set()  # set by main

ATOMICS = "atomic additions: trainer.deterministic=false"
KNOWN = {  # checks that are expected to fail, and the reason
    "again": ATOMICS,
    "half": ATOMICS,
}

COMPARED = {  # runs whose losses are compared with those of another run, and the largest difference allowed
    "gpu32": ("cpu32", 2e-3),
    "gpu32c": ("gpu32", 2e-3),
    "gpu16": ("cpu32", 3e-2),
    "chunked": ("gpu32", 1e-3),
    "ddp": ("gpu32", 2e-3),
    "accumulated": ("gpu32", 2e-3),
    "fsdp": ("gpu32", 2e-3),
    "fsdp16": ("ddp16", 5e-3),
    "tf32": ("gpu32", 1e-2),
    "offload": ("gpu32", 2e-3),
    "muon": ("muoncpu", 1e-2),
    "muonfsdp": ("muon", 2e-3),
    "masked": ("maskedcpu", 2e-3),
    "graphs": ("gpu32c", 2e-3),
    "graphs3": ("gpu32c", 2e-3),
}
LEARNING = ("maskeddrop", "maskedac", "modern", "modernfsdp", "ema", "growing", "dropout")  # runs whose loss decreases
REPEATED = {"again": "whole", "half": "whole", "again_d": "whole_d", "half_d": "whole_d"}  # runs with equal traces


def report(verdict: str, name: str, text: str) -> None:
    known = f"   [expected: {KNOWN[name]}]" if verdict == "FAIL" and name in KNOWN else ""
    print(f"{verdict:4} run.{name}: {text}{known}")


def expect(ok: bool, name: str, text: str) -> None:
    report("PASS" if ok else "FAIL", name, text)


def selected(name: str) -> bool:
    return not ONLY or name in ONLY


def run_dir(name: str) -> Path | None:
    """Returns the newest run directory of a check, or None if there is none."""
    found = sorted((WORK / name).glob("outputs/*/*/config.yaml"))
    return found[-1].parent if found else None


def rows(name: str) -> list[dict[str, str]]:
    """Returns the rows of metrics.csv, or an empty list if it does not exist."""
    directory = run_dir(name)
    if directory is None or not (directory / "metrics.csv").exists():
        return []
    with (directory / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(name: str, key: str) -> dict[int, float]:
    """Returns a metric by step."""
    return {int(row["step"]): float(row[key]) for row in rows(name) if row.get(key)}


def log_lines(name: str) -> list[str]:
    path = WORK / name / "log"
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def last_message(name: str) -> str:
    """Returns the last error in a log, or its last line if there is no error."""
    lines = [line for line in log_lines(name) if line.strip()]
    errors = [line for line in lines if "Error" in line or "gptlab:" in line]
    return (errors or lines or ["empty or missing log"])[-1].strip()[:170]


def status(name: str) -> str:
    """Returns the exit code of a check, "skipped" if no time was left for it, or "none"."""
    path = WORK / name / "rc"
    return path.read_text().strip() if path.exists() else "none"


def succeeded(name: str) -> bool:
    """Whether the exit code of the command is 0; reports a FAIL otherwise."""
    if status(name) == "0":
        return True
    if selected(name):
        report("FAIL", name, f"exit code {status(name)}: {last_message(name)}")
    return False


def check_losses(name: str, other: str, limit: float) -> None:
    """Compares the training losses by step, and the last validation loss, of two runs."""
    if not succeeded(name) or status(other) != "0":
        return
    a, b = column(name, "train/loss"), column(other, "train/loss")
    differences = [abs(a[step] - b[step]) for step in a.keys() & b.keys()]
    last_val, other_val = (list(column(run, "val/loss").values())[-1] for run in (name, other))
    val, worst = abs(last_val - other_val), max(differences, default=float("nan"))
    text = f"{len(differences)} losses compared with {other}: largest difference {worst:.1e}, val {val:.1e}"
    expect(worst <= limit and val <= limit, name, f"{text} (limit {limit:g})")


def check_equal_traces(name: str, other: str) -> None:
    """Checks that the traces of two runs are bit-identical."""
    if not (succeeded(name) and succeeded(other)):
        return
    a, b = ((run_dir(run) / "trace.jsonl").read_text().splitlines() for run in (name, other))
    different = [json.loads(line)["step"] for line, own in zip(a, b, strict=False) if line != own]
    equal = not different and len(a) == len(b)
    first = min(different, default="?")
    text = f"bit-identical to {other}, {len(a)} steps" if equal else f"differs from {other} from step {first} on"
    expect(equal, name, text)


def check_learns(name: str) -> None:
    if not succeeded(name):
        return
    losses = column(name, "train/loss")
    first, last = losses[min(losses)], losses[max(losses)]
    expect(last < first, name, f"train loss {first:.3f} at first, {last:.3f} at the end")


def check_out_of_memory() -> None:
    """Checks that a run that needs too much memory ends with a sentence."""
    if selected("oom"):
        lines = [line for line in log_lines("oom") if line.startswith("gptlab: train.micro_batch_size=")]
        ok = status("oom") == "1" and len(lines) == 1 and not any("Traceback" in line for line in log_lines("oom"))
        expect(ok, "oom", f"exit code {status('oom')}: {last_message('oom')}")


def check_sample() -> None:
    if status("sample") != "none" and succeeded("sample"):
        report("PASS", "sample", last_message("sample"))


def check_synchronizations() -> None:
    for line in log_lines("synced"):
        if line.startswith("SYNCS"):
            expect(int(line.split(":")[1].split(";")[0]) == 0, "synced", line)


def check_speed(name: str) -> None:
    """Reports speed and memory; checks that memory does not grow and agrees with the forecast."""
    if not selected(name):
        return
    speeds = column(name, "tokens_per_second")
    steady = [speed for _, speed in sorted(speeds.items())][2:]
    if not steady:
        report("FAIL", name, f"no speed: exit code {status(name)}: {last_message(name)}")
        return
    mfu = list(column(name, "mfu").values())
    peaks = list(column(name, "peak_memory_gb").values())
    first_step = float(rows(name)[0]["tokens"]) / speeds[min(speeds)]
    text = f"{statistics.median(steady):,.0f} tokens/s, MFU {100 * mfu[-1] if mfu else float('nan'):.1f} %, "
    text += f"peak {max(peaks, default=0):.1f} GB, first step {first_step:.0f} s (exit code {status(name)})"
    report("INFO", name, text)
    if len(peaks) > 3:
        expect(
            peaks[-1] < 1.02 * peaks[2], name, f"peak memory {peaks[2]:.2f} GB at first, {peaks[-1]:.2f} GB at the end"
        )
    try:
        check_forecast(name, max(peaks, default=0))
    except (OSError, KeyError, TypeError, ValueError) as error:
        report("INFO", name, f"no forecast: {error!r}")


def check_forecast(name: str, peak_gb: float) -> None:
    """Compares the peak memory in metrics.csv with the forecast, and with the measurement in forecast.json."""
    forecast = json.loads((run_dir(name) / "forecast.json").read_text())
    ratio = peak_gb * 1e9 / forecast["peak_memory_bytes"]
    text = f"peak memory is {ratio:.2f} x the forecast of {forecast['peak_memory_bytes'] / 1e9:.1f} GB"
    expect(0.9 < ratio < 1.1, name, text)
    measured = forecast.get("score", {}).get("peak_memory_bytes", {}).get("measured")
    if measured is not None:
        text = f"measured peak memory: {measured / 1e9:.1f} GB in forecast.json, {peak_gb:.1f} GB in metrics.csv"
        expect(abs(measured / (peak_gb * 1e9) - 1) < 0.1, name, text)


def median_speed(name: str) -> float:
    """Returns the median of tokens per second without the first two rows."""
    return statistics.median([speed for _, speed in sorted(column(name, "tokens_per_second").items())][2:])


def compare_with_nanogpt() -> None:
    if not selected("nanogpt"):
        return
    if status("nanogpt") == "none":
        report("INFO", "nanogpt", "skipped: NANOGPT is not set")
        return
    try:
        lines = [line for line in log_lines("nanogpt") if line.startswith("iter ")]
        step = statistics.median([float(line.split("time ")[1].split("ms")[0]) for line in lines][5:])
        tokens = 32 * 1024 / step * 1e3
        report("INFO", "nanogpt", f"{tokens:,.0f} tokens/s ({step:.1f} ms per step of 32 x 1024)")
        for name, prefix in (("gpt2_best", ""), ("gpt2", "with its defaults: ")):
            ratio = median_speed(name) / tokens
            expect(ratio > 0.97, name, f"{prefix}{ratio:.2f} x the speed of nanoGPT")
    except (IndexError, ValueError, statistics.StatisticsError) as error:
        report("FAIL", "nanogpt", f"{error!r}; {last_message('nanogpt')}")


def judge_correctness() -> None:
    succeeded("cpu32")
    succeeded("unit")
    succeeded("muoncpu")
    for name, (other, limit) in COMPARED.items():
        check_losses(name, other, limit)
    for name in LEARNING:
        check_learns(name)
    for name, other in REPEATED.items():
        check_equal_traces(name, other)
    check_out_of_memory()
    check_sample()
    check_synchronizations()
    check_speed("gpt2")
    if succeeded("bench"):
        report("PASS", "bench", last_message("bench"))


def check_padding(name: str) -> None:
    """Checks that a run with default options on a GPU has padded its vocabulary."""
    if selected(name) and (directory := run_dir(name)) is not None:
        padded = "pad_vocab_to_multiple_of: 64\n" in (directory / "config.yaml").read_text()
        expect(padded, name, "the rows of the embedding are a multiple of 64")


def judge_speed() -> None:
    succeeded("unit")
    succeeded("profile")
    for name in ("gpt2", "gpt2_best", "speedrun"):
        check_speed(name)
    check_padding("gpt2")
    compare_with_nanogpt()


def main() -> None:
    global WORK, PART, ONLY
    WORK, PART, ONLY = Path(sys.argv[1]), sys.argv[2], set(sys.argv[3:])
    judge_correctness() if PART == "1" else judge_speed()


if __name__ == "__main__":
    main()
