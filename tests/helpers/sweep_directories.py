"""Writes sweep directories with given trials, without running a sweep."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from conftest import TINY


def trial(overrides: Mapping[str, Any], value: float | None = None, state: str = "done", **more: Any) -> dict[str, Any]:
    written = {key: str(setting) for key, setting in overrides.items()}
    return {"overrides": written, "config_hash": "", "state": state, "value": value, "tokens": 1000} | more


def write_sweep(
    directory: Path, trials: Sequence[dict[str, Any]], baseline: Mapping[str, Any] = {}, missing: int = 0
) -> Path:
    """Writes sweep.json and every trial.json; ``missing`` more trials have not been proposed yet."""
    directory.mkdir(parents=True, exist_ok=True)
    keys = dict.fromkeys(key for trial in trials for key in trial["overrides"])
    sweep = {
        "question": "Which is best?",
        "space": {key: ",".join(dict.fromkeys(t["overrides"][key] for t in trials)) for key in keys},
        "fixed": [],
        "search": "grid",
        "n_trials": len(trials) + missing,
        "metric": "val/loss",
        "baseline": {key: str(value) for key, value in baseline.items()},
        "wandb_group": "",
    }
    (directory / "sweep.json").write_text(json.dumps(sweep))
    for number, values in enumerate(trials):
        (directory / str(number)).mkdir()
        (directory / str(number) / "trial.json").write_text(json.dumps({"number": number} | values))
    return directory


def write_model(directory: Path, **changes: Any) -> None:
    """Writes the config.yaml of a run, with the model config only."""
    (directory / "config.yaml").write_text(yaml.safe_dump({"model": TINY | changes}))
