"""Generates the figures in docs/figures from actual runs: make figures.

Runs are stored in outputs/figures and reused. Delete that directory to run them again. Each figure has two versions,
for light and dark (``<name>-dark``) pages. The screenshots of the report require Chromium.
"""

import csv
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import rich
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from PIL import Image
from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, SVG_EXPORT_THEME, TerminalTheme
from rich.text import Text

from gptlab.sweeps.analysis.report import print_answers
from gptlab.sweeps.analysis.table import analyze_sweep

ROOT = Path(__file__).parents[2]
FIGURES, RUNS = ROOT / "docs" / "figures", ROOT / "outputs" / "figures"
COLUMNS, NARROW = 100, 98  # terminal widths; below 100 columns, the table of a sweep omits some of its columns
PREPARE, TRAIN = ("gptlab.prepare",), ("gptlab.train",)
SWEEP = ("gptlab.train", "-m", "sweeps=lr", "model=tiny", "train.max_steps=300", "train.eval_every=100")
PROVE = ("gptlab.prove", "model=tiny")
MODELS = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1.6B"}
MICRO_BATCH = 4
KINDS = {  # keys of a plan's memory, in the order of the bars
    "weights": "weights",
    "copies": "bfloat16 copies of weights",
    "gradients": "gradients",
    "moments": "optimizer state",
    "activations": "activations",
    "logits": "logits and loss",
}


class Theme(NamedTuple):
    """Colors of a figure.

    Attributes:
        suffix: Suffix of the file name.
        text: Color of text and axes.
        colors: Colors of lines and bars.
        terminal: Colors of terminal output.
        scheme: Color scheme of the browser that renders the report.
    """

    suffix: str
    text: str
    colors: tuple[str, ...]
    terminal: TerminalTheme
    scheme: str


LIGHT = ("#4269d0", "#d1242f", "#3ca951", "#b8860b", "#8250df", "#6e7781")
DARK = ("#79a8ff", "#ff7b72", "#56d364", "#e3b341", "#bc8cff", "#9aa4af")
THEMES = (
    Theme("", "#1f2328", LIGHT, DEFAULT_TERMINAL_THEME, "light"),
    Theme("-dark", "#e6edf3", DARK, SVG_EXPORT_THEME, "dark"),
)


def main() -> None:
    """Generates all figures, or those named on the command line."""
    FIGURES.mkdir(exist_ok=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    record("prepare", PREPARE)  # first, so that training runs do not print that they prepare data
    pictures = {
        "train": lambda: draw_terminal("train", command_line(TRAIN), record("train", TRAIN)),
        "training": draw_loss,
        "sweep": draw_sweep_table,
        "lr": draw_learning_rates,
        "memory": draw_memory,
        "prove": lambda: draw_terminal("prove", command_line(PROVE), record("prove", PROVE)),
        "report": draw_report,
    }
    for name in sys.argv[1:] or pictures:
        pictures[name]()
        print(*sorted(str(path.relative_to(ROOT)) for path in FIGURES.iterdir() if path.stem in (name, f"{name}-dark")))


def run(arguments: tuple[str, ...]) -> str:
    """Runs a gptlab command in outputs/figures and returns its terminal output, including color codes."""
    terminal = {"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "0", "COLUMNS": str(COLUMNS)}  # colors, but no progress bar
    command, env = [sys.executable, "-m", *arguments], os.environ | terminal
    done = subprocess.run(command, cwd=RUNS, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command_line(arguments)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def record(name: str, arguments: tuple[str, ...]) -> str:
    """Returns the output of a command; runs it only if no output is stored."""
    path = RUNS / f"{name}.txt"
    if not path.exists():
        path.write_text(run(arguments), encoding="utf-8")
    return path.read_text(encoding="utf-8")


def command_line(arguments: tuple[str, ...]) -> str:
    """Returns a command as text: python -m ..."""
    return " ".join(("python -m", *arguments))


def newest(name: str) -> Path:
    """Returns the newest run or sweep directory of this name."""
    return max((RUNS / "outputs" / name).iterdir())


def read_metrics(directory: Path, name: str) -> tuple[list[float], list[float]]:
    """Returns the tokens seen, in millions, and the values of a metric."""
    with (directory / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get(name)]
    return [int(float(row["tokens"])) / 1e6 for row in rows], [float(row[name]) for row in rows]


def draw_chart(name: str, draw: Callable[[Axes, Theme], None], size: tuple[float, float]) -> None:
    """Writes a chart as SVG with a transparent background; the same data gives identical files."""
    for theme in THEMES:
        colors = dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), theme.text
        )
        style: dict[str, Any] = {"svg.hashsalt": name, "font.size": 13, "axes.spines.top": False} | colors
        with mpl.rc_context(style | {"axes.spines.right": False, "grid.alpha": 0.25, "legend.frameon": False}):
            figure, axes = plt.subplots(figsize=size, layout="constrained")
            draw(axes, theme)
            path = FIGURES / f"{name}{theme.suffix}.svg"
            figure.savefig(path, transparent=True, metadata={"Date": None})
            plt.close(figure)


def draw_terminal(name: str, command: str, output: str) -> None:
    """Writes the output of a command as an SVG of a terminal, in a monospaced font of the reader's system."""
    rich_template = inspect.signature(Console.export_svg).parameters["code_format"].default
    template = re.sub(r"@font-face \{\{.*?\}\}", "", rich_template, flags=re.DOTALL)
    template = template.replace("Fira Code", "ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono")
    text = Text.from_ansi(re.sub(r"\x1b\[\?25[lh]|\r", "", output).strip("\n"))
    for theme in THEMES:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True, color_system="truecolor")
            console.print(Text(f"$ {command}", "bold"), text, "", sep="\n")
        svg = console.export_svg(title="", theme=theme.terminal, code_format=template, unique_id=name)
        svg = svg.replace("rgba(255,255,255,0.35)", "rgba(128,128,128,0.5)")  # visible on light pages, too
        (FIGURES / f"{name}{theme.suffix}.svg").write_text(re.sub(r"[ \t]+\n", "\n", svg), encoding="utf-8")


def draw_loss() -> None:
    """Draws train and val loss of the default run over tokens."""
    record("train", TRAIN)
    directory = newest("quickstart")

    def draw(axes: Axes, theme: Theme) -> None:
        axes.plot(*read_metrics(directory, "train/loss"), color=theme.colors[0], lw=1.5, label="train loss")
        tokens, losses = read_metrics(directory, "val/loss")
        axes.plot(tokens, losses, "o-", color=theme.colors[1], lw=2, ms=6, label="val loss")
        axes.annotate(
            f"{losses[-1]:.3f}", (tokens[-1], losses[-1]), (0, 22), textcoords="offset points", ha="center", va="bottom"
        )
        axes.set(xlabel="tokens (millions)", ylabel="loss (nats per token)", xlim=(0, tokens[-1] * 1.05))
        axes.grid()
        axes.legend()

    draw_chart("training", draw, (8, 4))


def sweep_directory() -> Path:
    """Returns the directory of the sweep over learning rates; runs the sweep if necessary."""
    record("sweep", SWEEP)
    return newest("lr")


def draw_sweep_table() -> None:
    """Draws the final output of a sweep: its table and its answer."""
    answers = analyze_sweep(sweep_directory())
    rich.reconfigure(width=NARROW, force_terminal=True, color_system="truecolor")
    with rich.get_console().capture() as captured:
        print_answers(answers)
    draw_terminal("sweep", command_line(SWEEP), captured.get())


def draw_learning_rates() -> None:
    """Draws the val loss of each trial over its learning rate, and the mean over seeds."""
    directory = sweep_directory()
    trials = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*/trial.json"))]
    losses: dict[float, list[float]] = {}
    for trial in trials:
        losses.setdefault(float(trial["overrides"]["optimizer.lr"]), []).append(trial["value"])
    rates = sorted(losses)

    def draw(axes: Axes, theme: Theme) -> None:
        for rate in rates:
            axes.plot([rate] * len(losses[rate]), losses[rate], "o", color=theme.colors[0], alpha=0.6)
        axes.plot(rates, [sum(losses[rate]) / len(losses[rate]) for rate in rates], color=theme.colors[0])
        axes.set(xscale="log", xlabel="learning rate", ylabel="val loss (nats per token)")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.grid()

    draw_chart("lr", draw, (8, 4))


def draw_memory() -> None:
    """Draws the forecast of memory by kind for GPT-2's four sizes on one GPU."""
    plans = {}
    for model in MODELS:
        path = RUNS / f"plan-{model}.json"
        batch = (f"train.global_batch_size={MICRO_BATCH}", f"train.micro_batch_size={MICRO_BATCH}")
        record(f"plan-{model}", ("gptlab.plan", f"model={model}", "gpu=h100", *batch, f"json={path}"))
        plans[f"{model} ({MODELS[model]})"] = json.loads(path.read_text(encoding="utf-8"))

    def draw(axes: Axes, theme: Theme) -> None:
        left = dict.fromkeys(plans, 0.0)
        for (key, label), color in zip(KINDS.items(), theme.colors, strict=True):
            sizes = [plan["memory"][key] / 1e9 for plan in plans.values()]
            axes.barh(list(plans), sizes, 0.6, list(left.values()), color=color, label=label)
            left = {name: left[name] + size for name, size in zip(plans, sizes, strict=True)}
        for row, (name, end) in enumerate(left.items()):
            axes.text(end + 0.5, row, f"{plans[name]['memory']['total'] / 1e9:.1f} GB", va="center")
        axes.set(xlabel=f"peak memory (GB): bf16-mixed, micro-batches of {MICRO_BATCH} x 1,024 tokens")
        axes.set_xlim(0, 1.12 * max(left.values()))
        axes.invert_yaxis()
        axes.get_figure().legend(ncols=3, loc="outside upper center")

    draw_chart("memory", draw, (8, 3.6))


def draw_report() -> None:
    """Takes screenshots of the top of the sweep's report."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from chromium import Seen, chromium

    run(("gptlab.report", f"runs={sweep_directory()}", "out=report.html"))
    for theme in THEMES:
        path = FIGURES / f"report{theme.suffix}.png"
        with chromium() as browser:
            page = Seen(browser, viewport={"width": 1100, "height": 1348}, color_scheme=theme.scheme)
            page.open(RUNS / "report.html").page.wait_for_timeout(500)
            page.page.screenshot(path=path)
        Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
