"""Files that training opens and addresses that it uses, as the kernel sees them (strace)."""

import getpass
import os
import re
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

import gptlab
from commands import assert_success
from conftest import SMALL, User
from gptlab.config.command import configuration_folder

CALLS = (
    *("open", "openat", "creat", "mkdir", "mkdirat", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir"),
    *(
        "link",
        "linkat",
        "symlink",
        "symlinkat",
        "truncate",
        "chmod",
        "fchmodat",
        "connect",
        "bind",
        "sendto",
        "sendmsg",
    ),
)
CALL = re.compile(r"^\d+ +(\w+)\((.*)$")
PATH = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')  # with its directory, from strace -y
ADDRESS = re.compile(r'sa_family=(\w+)(?:.*?inet_addr\("([^"]+)"\)|.*?inet_pton\(AF_INET6, "([^"]+)")?')
WRITES = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC")
SYSTEM = ("/bin", "/dev", "/etc", "/lib", "/lib64", "/opt", "/proc", "/run", "/sbin", "/sys", "/usr", "/var")
INSTALLED = (
    *(sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), os.path.realpath(sys.base_prefix)),
    *(str(Path(gptlab.__file__).parents[1]), str(configuration_folder().resolve()), *filter(None, sys.path)),
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed"),
]


class Trace:
    """Runs a command and records what it and its child processes open, change and connect to.

    Attributes:
        read: Paths that were opened for reading.
        written: Paths that were created, changed or deleted.
        addresses: Families and addresses of sockets.
    """

    def __init__(self, user: User, *command: str) -> None:
        log = user.folder.parent / f"{user.folder.name}.strace"
        flags = ("-f", "--seccomp-bpf", "-qq", "-y", "-s", "4096", "-o", str(log), "-e", f"trace={','.join(CALLS)}")
        self.done = user.run("strace", *flags, *command)
        self.read: set[Path] = set()
        self.written: set[Path] = set()
        self.addresses: set[tuple[str, str]] = set()
        for line in log.read_text(errors="replace").splitlines():
            if match := CALL.match(line):
                self._add(match[1], match[2], user.folder)

    def _add(self, name: str, rest: str, folder: Path) -> None:
        if name in ("connect", "bind", "sendto"):
            if found := ADDRESS.search(rest):
                self.addresses.add((found[1], found[2] or found[3] or ""))
        elif not re.search(r"= -1 E\w+", rest):
            is_read = name in ("open", "openat") and not WRITES.search(rest)
            paths = {Path(os.path.normpath(Path(folder, base, path))) for base, path in PATH.findall(rest)}
            (self.read if is_read else self.written).update(paths)


def outside(paths: set[Path], *folders: str | Path) -> list[str]:
    return sorted(str(path) for path in paths if not any(path.is_relative_to(folder) for folder in folders))


def beyond_loopback(addresses: set[tuple[str, str]]) -> set[tuple[str, str]]:
    local = {"AF_UNIX", "AF_NETLINK", "AF_UNSPEC"}  # netlink: the kernel
    return {(kind, name) for kind, name in addresses if kind not in local and name not in ("::1", "127.0.0.1")}


@pytest.fixture
def traced(user) -> User:
    """User with a home directory and a directory for temporary files."""
    for name, folder in (("HOME", "home"), ("TMPDIR", "temporary"), ("MPLCONFIGDIR", "temporary/matplotlib")):
        (user.folder / folder).mkdir()
        user.environment[name] = str(user.folder / folder)
    user.environment["PYTHONDONTWRITEBYTECODE"] = "1"
    if user.run("strace", "-f", "--seccomp-bpf", "true").returncode:
        pytest.skip("strace is not permitted")
    return user


KINDS = {
    "default": (),
    "ddp": ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "train.global_batch_size=24"),
    "sweep": ("-m", "optimizer.lr=1e-3,2e-3"),
}


@pytest.mark.parametrize("overrides", KINDS.values(), ids=KINDS)
def test_training_touches_only_its_directories_and_loopback(traced, overrides):
    trace = Trace(traced, sys.executable, "-m", "gptlab.train", *overrides, *SMALL)
    assert_success(trace.done)
    own = [traced.folder / name for name in ("outputs", "cache", "temporary")]
    # matplotlib, if installed, is imported by torchmetrics and lists the user's fonts
    fonts = [traced.folder / "home" / name for name in (".fonts", ".local/share/fonts", ".cache/fontconfig")]
    assert any(path.name == "config.yaml" for path in trace.written)  # the trace is not empty
    # importing torch._dynamo makes this directory, if it is missing
    torch_cache = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    assert outside(trace.written - {torch_cache}, *own, *fonts, "/dev") == []
    listings = {traced.folder, Path("/")}
    assert outside(trace.read - listings, *own, traced.folder / "text.txt", *fonts, *SYSTEM, *INSTALLED) == []
    assert beyond_loopback(trace.addresses) == set()


def test_other_files_and_addresses_are_found(traced):
    code = (
        "import socket, os\nopen('home/a', 'w')\nos.mkdir('home/b')\nos.rename('home/a', 'home/c')\nopen('home/c')\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.bind(('0.0.0.0', 0))\ns.connect(('192.0.2.1', 9))\n"
    )
    trace = Trace(traced, sys.executable, "-c", code)
    home = traced.folder / "home"
    assert set(outside(trace.written)) >= {str(home / name) for name in "abc"}
    assert home / "c" in trace.read
    assert beyond_loopback(trace.addresses) >= {("AF_INET", "0.0.0.0"), ("AF_INET", "192.0.2.1")}  # noqa: S104
