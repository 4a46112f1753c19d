"""Prove a configuration: python -m gptlab.prove [what gptlab.train takes ...] [prove.<key>=<value> ...]."""

import shutil
import signal
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from gptlab.config.base import known_keys
from gptlab.config.command import command
from gptlab.config.schema import RunConfig
from gptlab.errors import UserError
from gptlab.exit_codes import DONE, FAILED
from gptlab.launch.launcher import preflight
from gptlab.tracking.logs import quiet_lightning
from gptlab.tracking.run_directory import claim_directory
from gptlab.training.distributed.processes import launched_externally
from gptlab.verification.configs import ProveArguments, resolve_proof
from gptlab.verification.report import all_passed, print_proofs, write_report
from gptlab.verification.runs import ProofRuns


@command("prove", keys={*known_keys(RunConfig), *known_keys(ProveArguments)})
def main(values: DictConfig) -> int:
    """Checks the configuration, runs it in several ways, and reports which of its promises it keeps."""
    if values.resume is not None or launched_externally():
        raise UserError("A proof starts its runs itself, and from their beginning: without resume=, torchrun and srun.")
    config, wanted = resolve_proof(values, list(HydraConfig.get().overrides.task))
    config, prepared, _ = preflight(config)
    from gptlab.verification.proofs import ProofCase, prove_all  # torch is needed from here on

    quiet_lightning()
    case = ProofCase(config, prepared, wanted)
    folder = _folder(wanted.out)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # which ends what is running
    proofs = list(prove_all(case, ProofRuns(folder / "runs")))
    print_proofs(config, wanted.steps, proofs)
    path = write_report(folder, config, proofs)
    if not all_passed(proofs):
        print(f"Not proved: {path}\nWhat was run is in {folder / 'runs'}")
        return FAILED
    if not wanted.keep:
        shutil.rmtree(folder / "runs")
    print(f"Proved: {path}")
    return DONE


def _folder(out: str | None) -> Path:
    """Creates the folder of the report and the runs."""
    try:
        folder = claim_directory(Path("outputs/prove")) if out is None else Path(out).expanduser()
        (folder / "runs").mkdir(parents=True)
    except OSError as error:
        raise UserError(f"prove.out={out} cannot be made, or holds the runs of another proof: {error}.") from error
    return folder


if __name__ == "__main__":
    main()
