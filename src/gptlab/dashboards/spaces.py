"""Exports the sweeps of ``sweeps/`` as files for `wandb sweep`, with the same search spaces. Imports no torch."""

from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Transformer
from hydra.errors import HydraException
from omegaconf import OmegaConf

from gptlab.errors import UserError, failure_reason
from gptlab.files import check_output, write_file

METHODS = {"grid": "grid", "random": "random", "tpe": "bayes", "cmaes": "bayes"}  # gptlab's search method -> W&B's
METRIC = "val/loss"
MARK = "# Generated from sweeps/"  # beginning of the written files


def write_wandb_sweeps(sweeps: Path, logger: Path, folder: Path, *, overwrite: bool) -> list[Path]:
    """Writes a file for `wandb sweep` for each sweep.

    Args:
        sweeps: Directory with the sweeps' configuration files.
        logger: conf/logger/wandb.yaml, which defines the project.
        folder: Output directory; created if necessary.
        overwrite: Whether to replace files that this function has not written.

    Returns:
        Paths of the written files.

    Raises:
        UserError: A search space cannot be read or is empty, the files cannot be written, or ``overwrite`` is false and
            one of them exists and was not written by this function.
    """
    project = OmegaConf.load(logger).wandb.project
    texts = {path.name: wandb_sweep(path, project) for path in sorted(sweeps.glob("*.yaml"))}
    for name in texts:
        check_output(folder / name, "wandb_sweeps", MARK, overwrite=overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_file(folder / name, text)
    except OSError as error:
        raise UserError(f"wandb_sweeps={folder} cannot be written: {failure_reason(error)}.") from error
    return [folder / name for name in texts]


def wandb_sweep(path: Path, project: str) -> str:
    """Returns the file for `wandb sweep` of one sweep, as YAML.

    Raises:
        UserError: The search space cannot be read or is empty.
    """
    text = path.read_text(encoding="utf-8")
    sweeper = yaml.safe_load(text)["hydra"]["sweeper"]
    overrides = [_parsed(path, key, value) for key, value in (sweeper.get("params") or {}).items()]
    varied = [override for override in overrides if override.is_sweep_override()]
    if not varied:
        raise UserError(f"{path} varies no config key: hydra.sweeper.params has no key with several values.")
    fixed = [f"{o.get_key_element()}={o.get_value_string()}" for o in overrides if not o.is_sweep_override()]
    search = sweeper.get("search") or ("grid" if all(o.is_discrete_sweep() for o in varied) else "tpe")
    values: dict[str, Any] = {
        "name": path.stem,
        "description": sweeper.get("question") or _question(text),
        "project": project,
        "program": "gptlab.train",
        "method": METHODS[search],
        "metric": {"name": sweeper.get("metric") or METRIC, "goal": "minimize"},
        "parameters": {override.get_key_element(): _parameter(path, override) for override in varied},
        **({"run_cap": sweeper["n_trials"]} if sweeper.get("n_trials") else {}),
        # Hydra composes the rest of the sweep's file as usual, for a single run
        "command": [
            *("${env}", "${interpreter}", "-m", "gptlab.train"),
            *(f"sweeps={path.stem}", "hydra.mode=RUN", "logger=wandb", *fixed, "${args_no_hyphens}"),
        ],
    }
    header = (
        f"{MARK}{path.name} by python -m gptlab.dashboard wandb_sweeps=sweeps/wandb; do not edit.\n"
        f"# Run `wandb sweep sweeps/wandb/{path.name}`, then the `wandb agent` command that it prints on any machine.\n"
    )
    return header + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def _parsed(path: Path, key: str, value: object) -> Override:
    try:
        return OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException as error:
        raise UserError(f"{path}: hydra.sweeper.params has {key}={value}, which cannot be parsed: {error}") from None


def _parameter(path: Path, override: Override) -> dict[str, Any]:
    """Returns W&B's parameter specification for the values of a key."""
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        low, high = sweep.start, sweep.end
        is_whole = isinstance(low, int) and isinstance(high, int)
        if "log" in sweep.tags:
            kind: dict[str, Any] = {"distribution": "log_uniform_values"}
            if is_whole:
                kind = {"distribution": "q_log_uniform_values", "q": 1}
        else:
            kind = {"distribution": "int_uniform" if is_whole else "uniform"}
        return {**kind, "min": low, "max": high}
    try:
        values = [_plain(value) for value in override.sweep_iterator()]
    except HydraException:  # a glob, which Hydra resolves only on the command line
        values = []
    if not values:
        raise UserError(f"{path}: {override.input_line} cannot be expanded to a list of values.")
    return {"values": values}


def _plain(value: Any) -> Any:
    """Returns a value in a form that Hydra parses from W&B's agent: numbers unchanged, others as Hydra's string."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else Transformer.str(value)


def _question(text: str) -> str:
    """Returns the comment of a sweep without the command at its end."""
    comment = " ".join(line.removeprefix("# ") for line in text.splitlines()[1:] if line.startswith("# "))
    return comment.partition("python -m")[0].rstrip(": ")
