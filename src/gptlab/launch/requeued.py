"""A run that is started again by itself, and goes on: in a sweep, or by SLURM. Imports no torch."""

from pathlib import Path

from gptlab.config.resume import differences, goes_on
from gptlab.config.schema import Config
from gptlab.errors import UserError
from gptlab.launch.slurm import runs_of_this_job
from gptlab.tracking.run_directory import has_checkpoint
from gptlab.tracking.run_store.runs import CONFIG


def go_on(config: Config, place: Path | None) -> tuple[Config, Path | None]:
    """See whether this very run was begun before: by the same sweep, or by this SLURM job before it was requeued.

    Args:
        config: Checked.
        place: The run directory that a sweep has set apart.

    Returns:
        The configuration, which resumes the earlier run where that has a checkpoint, and the directory of the run where
        it is known.

    Raises:
        UserError: Another run is in ``place``.
    """
    if config.resume:
        return config, place
    if place is not None and (place / CONFIG).is_file() and has_checkpoint(place):
        if differing := differences(config, place):
            raise UserError(
                f"{place} holds another run already: {', '.join(differing)} would change. What can be done: another "
                "hydra.sweep.dir, or removing that directory."
            )
        return goes_on(config, place), place
    for earlier in runs_of_this_job(Path("outputs") / config.name):
        if (earlier / CONFIG).is_file() and not differences(config, earlier):
            return (goes_on(config, earlier) if has_checkpoint(earlier) else config), earlier
    return config, place
