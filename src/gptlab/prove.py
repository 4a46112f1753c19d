"""Verifies a configuration: python -m gptlab.prove [overrides of gptlab.train ...] [prove.<key>=<value> ...]."""

import shutil
import signal
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from gptlab.config.base import known_keys
from gptlab.config.command import command
from gptlab.config.locations import outputs_folder
from gptlab.config.schema import RunConfig
from gptlab.errors import UserError, failure_reason
from gptlab.exit_codes import DONE, FAILED
from gptlab.files import check_output_directory
from gptlab.launch.launcher import preflight
from gptlab.terminal import print_message
from gptlab.tracking.logs import quiet_lightning
from gptlab.tracking.run_directory import claim_directory
from gptlab.training.distributed.processes import check_cpu_processes, launched_externally, may_have_gpu
from gptlab.verification.configs import ProveArguments, resolve_proof
from gptlab.verification.report import REPORT, REPORT_MARK, all_passed, print_proofs, write_report
from gptlab.verification.runs import ProofRuns


@command("prove", keys={*known_keys(RunConfig), *known_keys(ProveArguments)})
def main(values: DictConfig) -> int:
    """Runs a configuration in several ways to verify data order, resuming and distributed training."""
    if values.resume is not None or launched_externally():
        raise UserError(
            "gptlab.prove starts its own runs from step 0: it cannot be used with resume=, torchrun or srun."
        )
    config, prove = resolve_proof(values, list(HydraConfig.get().overrides.task))
    if prove.out is not None:
        out = Path(prove.out).expanduser()
        check_output_directory(out, "prove.out", [REPORT], REPORT_MARK, overwrite=prove.overwrite)
    if not may_have_gpu():
        check_cpu_processes(max(prove.ranks), "prove.ranks")
    config, prepared, _ = preflight(config)
    from gptlab.verification.proofs import ProofCase, prove_all  # imports torch

    quiet_lightning()
    case = ProofCase(config, prepared, prove)
    folder = _create_folder(prove.out)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # SystemExit ends the current run
    proofs = list(prove_all(case, ProofRuns(folder / "runs")))
    print_proofs(config, prove.steps, proofs)
    path = write_report(folder, config, proofs)
    if not all_passed(proofs):
        print_message(f"Failed: {path}\nThe runs are in {folder / 'runs'}")
        return FAILED
    if not prove.keep:
        shutil.rmtree(folder / "runs")
    print_message(f"Passed: {path}")
    return DONE


def _create_folder(out: str | None) -> Path:
    """Creates the directory of the report and the runs."""
    try:
        folder = claim_directory(outputs_folder() / "prove") if out is None else Path(out).expanduser()
        (folder / "runs").mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"prove.out={out} cannot be created or contains other runs: {failure_reason(error)}."
        ) from error
    return folder


if __name__ == "__main__":
    main()
