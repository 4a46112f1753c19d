"""A SLURM cluster of one node for the tests, with state, keys and sockets in a separate directory."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "srun", "sbatch", "scancel", "scontrol")
CONFIGURATION = """
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
SchedulerParameters=bf_interval=3,sched_interval=5
ReturnToService=2
NodeName=localhost NodeAddr=127.0.0.1 NodeHostname={host} CPUs={cores} State=UNKNOWN
PartitionName=tests Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def unavailable_reason() -> str | None:
    """Returns the reason why no cluster can be started, or None."""
    if os.geteuid() != 0:
        return "starting a SLURM cluster requires root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"SLURM is not installed (apt-get install slurm-wlm munge): {', '.join(missing)}" if missing else None


class Cluster:
    """Context manager that starts and stops the daemons."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.daemons = folder, []  # type: Path, list[subprocess.Popen[bytes]]
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        values = {"controller": _free_port(), "daemon": _free_port(), "host": socket.gethostname().partition(".")[0]}
        text = CONFIGURATION.format(folder=self.folder, cores=os.cpu_count(), **values)
        (self.folder / "slurm.conf").write_text(text)
        sockets = (f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munge.pid")
        seed = (f"--seed-file={self.folder}/munge.seed", f"--log-file={self.folder}/munge.log")
        self._start("munged", "--foreground", "--force", f"--key-file={key}", *sockets, *seed)
        time.sleep(1)
        self._start("slurmctld", "-D")
        self._start("slurmd", "-D")
        until = time.monotonic() + 60
        while self.run("sinfo", "--noheader", "--format=%t").stdout.strip() != "idle":
            if time.monotonic() > until:
                logs = "\n".join(path.read_text()[-2000:] for path in self.folder.glob("*.log"))
                self.__exit__()
                raise TimeoutError(f"no idle node after a minute:\n{logs}")
            time.sleep(0.5)
        return self

    def __exit__(self, *error: object) -> None:
        self.run("scancel", "--user=root")
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait(timeout=30)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, check=False)

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.log").open("wb") as log:
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
