"""Plan a run: python -m gptlab.plan [what gptlab.train takes ...] [gpu=... budget=... calibrate=true json=...]."""

import json
import shlex
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from gptlab.config.base import known_keys
from gptlab.config.command import command
from gptlab.config.schema import RunConfig
from gptlab.data.shards.manifest import write_durably
from gptlab.errors import UserError
from gptlab.exit_codes import DONE
from gptlab.planning.calibration import calibrate
from gptlab.planning.plans import Plan, as_json, choose_for, make_plan
from gptlab.planning.report import print_choice, print_plan
from gptlab.planning.settings import KEYS, of_run, resolve_both, with_data


@command("plan", keys={*known_keys(RunConfig), *KEYS})
def main(values: DictConfig) -> int:
    """Say what a run will need and, for a budget, which run it should be."""
    overrides = list(HydraConfig.get().overrides.task)
    config, wanted = resolve_both(values, overrides)
    config, manifest = with_data(config)
    choice = None if wanted.budget is None else choose_for(config, wanted.budget, wanted.gpus)
    config = choice.config if choice else config
    if wanted.calibrate:
        calibrate(config)
        config, manifest = with_data(config)
    plan = make_plan(config, manifest, wanted.gpus, wanted.mfu)
    print_plan(plan)
    if choice is not None:
        print_choice(choice, shlex.join(("python", "-m", "gptlab.train", *of_run(overrides), *choice.overrides)))
    if wanted.json_file is not None:
        _write(Path(wanted.json_file).expanduser(), plan)
    return DONE


def _write(path: Path, plan: Plan) -> None:
    try:
        write_durably(path, json.dumps(as_json(plan), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"json={path} cannot be written: {error}.") from error


if __name__ == "__main__":
    main()
