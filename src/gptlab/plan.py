"""Plans a run: python -m gptlab.plan [overrides of gptlab.train ...] [gpu=... budget=... calibrate=true json=...]."""

import json
import shlex
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from gptlab.config.base import known_keys
from gptlab.config.command import command
from gptlab.config.schema import RunConfig
from gptlab.config.search_path import FLAG
from gptlab.errors import UserError, failure_reason
from gptlab.exit_codes import DONE
from gptlab.files import check_output, write_durably
from gptlab.launch.components import check_components, count_components
from gptlab.planning.calibration import calibrate
from gptlab.planning.plans import PLAN_MARK, RunPlan, choose_run, make_plan, plan_padding, plan_to_dict
from gptlab.planning.report import print_choice, print_plan
from gptlab.planning.settings import KEYS, resolve_plan, run_overrides, with_vocabulary


@command("plan", keys={*known_keys(RunConfig), *KEYS})
def main(values: DictConfig) -> int:
    """Prints the plan of a run and, for a budget, the compute-optimal run."""
    overrides = list(HydraConfig.get().overrides.task)
    config, plan_config = resolve_plan(values, overrides)
    if plan_config.json_file is not None:
        check_output(Path(plan_config.json_file).expanduser(), "json", PLAN_MARK, overwrite=plan_config.overwrite)
    config, manifest = with_vocabulary(plan_padding(config, plan_config.gpus))
    check_components(config)
    choice = None if plan_config.budget is None else choose_run(config, plan_config.budget, plan_config.gpus)
    config = choice.config if choice else config
    if plan_config.calibrate:
        calibrate(config)
        config, manifest = with_vocabulary(config)
    config = count_components(config)
    plan = make_plan(config, manifest, plan_config.gpus, plan_config.mfu, plan_config.bandwidth)
    print_plan(plan)
    if choice is not None:
        arguments = (*_config_dir(), *run_overrides(overrides), *choice.overrides)
        print_choice(choice, shlex.join(("python", "-m", "gptlab.train", *arguments)))
    if plan_config.json_file is not None:
        _write(Path(plan_config.json_file).expanduser(), plan)
    return DONE


def _config_dir() -> list[str]:
    """Returns the flag --config-dir of this command, if it has one."""
    sources = HydraConfig.get().runtime.config_sources
    return [f"{FLAG}={source.path}" for source in sources if source.provider == FLAG]


def _write(path: Path, plan: RunPlan) -> None:
    try:
        write_durably(path, json.dumps(plan_to_dict(plan), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"json={path} cannot be written: {failure_reason(error)}.") from error


if __name__ == "__main__":
    main()
