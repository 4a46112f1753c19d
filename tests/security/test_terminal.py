"""Text from somebody else reaches terminals and logs without control sequences."""

import io
import logging
import os
import pty
import re
import sys
import threading
import unicodedata
import warnings
from collections.abc import Callable
from typing import TextIO

import pytest
import rich
import yaml
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gptlab.errors import UserError
from gptlab.exit_codes import report_error
from gptlab.launch.prepare_data import print_batch
from gptlab.planning.budget import ComputeOptimalChoice
from gptlab.planning.report import print_choice
from gptlab.terminal import (
    check_output_is_written,
    escape_controls,
    get_console,
    install_hooks,
    print_data,
    print_exception,
    print_message,
)
from gptlab.tracking.logs import ConsoleHandler, close_log, log_to_console, log_to_file
from gptlab.tracking.run_store.listing import COLUMNS, format_table
from run_directories import write_run

CLIPBOARD, TITLE, CLEAR, C1_TITLE = "\x1b]52;c;Y3VybA==\x07", "\x1b]0;owned\x07", "\x1b[2J\x1b[H", "\x9d0;owned\x9c"
HOSTILE = f"a{CLIPBOARD}b{TITLE}c{CLEAR}d{C1_TITLE}e\u202egpj.exe\u2066\u2028f\rg\x08h"
BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def controls(text: str) -> set[str]:
    """Returns the characters that act on a terminal, by Unicode's properties; rich's own sequences must be removed."""
    return {
        char
        for char in text
        if (unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(char) in BIDI)
        and char not in "\n\t"
    }


@pytest.fixture
def screen(capsys) -> Callable[[], str]:
    """Returns what was written to stdout and stderr since the last call. rich's console is not a terminal."""
    before = dict(rich.get_console().__dict__)
    rich.reconfigure(force_terminal=False, width=100)
    yield lambda: "".join(capsys.readouterr())
    rich.get_console().__dict__ = before


def test_exactly_the_control_characters_are_escaped():
    text = "".join(map(chr, range(sys.maxunicode + 1)))
    escaped = controls(text)
    assert [char for char in escaped if escape_controls(char) == char] == []
    others = text.translate(dict.fromkeys(map(ord, escaped)))
    assert escape_controls(others) == others
    assert escape_controls("\x1b[2J\x9b\u202e\udc9b\n\té") == "\\x1b[2J\\x9b\\u202e\\udc9b\n\té"


def table() -> None:
    drawn = Table(title=escape(HOSTILE))
    drawn.add_column(Text(HOSTILE))
    drawn.add_row(Text(HOSTILE))
    drawn.add_row(HOSTILE)
    get_console().print(drawn)


def live() -> None:
    with Live(Text(HOSTILE), console=get_console()):
        get_console().print(HOSTILE)


def log() -> None:
    handler = ConsoleHandler()
    handler.handle(logging.LogRecord("gptlab", logging.INFO, "", 1, "a %s", (HOSTILE,), None))


def uncaught() -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        print_exception(type(error), error, error.__traceback__)


def warn() -> None:
    with warnings.catch_warnings():
        install_hooks()
        warnings.simplefilter("always")
        warnings.warn(HOSTILE, stacklevel=1)


def uncaught_in_thread() -> None:
    install_hooks()
    thread = threading.Thread(target=int, args=(f"x{HOSTILE}",), name="a")
    thread.start()
    thread.join()


SCREENS = {
    "message": lambda: print_message(HOSTILE),
    "error": lambda: report_error(UserError(HOSTILE)),
    "uncaught": uncaught,
    "uncaught in a thread": uncaught_in_thread,
    "warning": warn,
    "log": log,
    "panel": lambda: get_console().print(Panel(Text(HOSTILE), title=Text(HOSTILE))),
    "table": table,
    "live": live,
    "window of a corpus": lambda: print_batch([(0, HOSTILE)]),
    "list of runs": lambda: get_console().print(
        format_table([{"run": HOSTILE, "state": HOSTILE}], COLUMNS, left_out=0)
    ),
}


@pytest.mark.parametrize("show", SCREENS.values(), ids=SCREENS)
def test_control_characters_are_shown_as_escapes(screen, monkeypatch, show):
    for module, hook in ((sys, "excepthook"), (threading, "excepthook"), (warnings, "showwarning")):
        monkeypatch.setattr(module, hook, getattr(module, hook))  # restored at the end
    print(HOSTILE)
    assert controls(screen()) >= {"\x1b", "\x9d", "\u202e", "\u2066"}, "the payload has no effect"
    Console().print(Text(HOSTILE))
    assert controls(screen()) >= {"\x1b", "\x9d", "\u202e", "\u2066"}, "the payload has no effect"
    show()
    shown = screen()
    assert controls(shown) == set()
    assert "\\x1b" in shown


def test_colors_are_kept_and_only_foreign_sequences_are_escaped(screen):
    rich.reconfigure(force_terminal=True, color_system="standard", width=100, legacy_windows=False)
    get_console().print(Text("red", "red"))
    get_console().print(Panel("x", title=Text("\x1b[2J"), border_style="red", width=20))
    shown = screen()
    assert "\x1b[31mred\x1b[0m\n" in shown
    assert "\\x1b[2J" in shown
    assert controls(re.sub(r"\x1b\[(31|0)m", "", shown)) == set()


def test_markup_in_an_override_is_shown_as_text(screen):
    link = "name=[link=file:///etc/passwd]x[/link]"
    rich.reconfigure(force_terminal=True, color_system="standard", width=200, legacy_windows=False)
    table = Table("")
    table.add_row(link)
    rich.get_console().print(table)
    assert "\x1b]8;" in screen(), "the payload has no effect"
    print_choice(ComputeOptimalChoice(None, [link], 20), "command")
    shown = screen()
    assert "\x1b]8;" not in shown
    assert "[link=file:///etc/passwd]x[/link]" in shown


def test_the_log_file_has_escapes_also_in_tracebacks(tmp_path):
    handler = log_to_file(tmp_path / "train.log")
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logging.getLogger("gptlab.x").exception("failed: %s", HOSTILE)
    finally:
        close_log(handler)
    written = (tmp_path / "train.log").read_bytes().decode()
    assert controls(written) == set()
    assert written.count("\\x1b]52") == 2  # the message and the traceback


def test_logs_through_a_handler_that_hydra_configures_are_escaped():
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    logging.getLogger().addHandler(handler)
    try:
        log_to_console()
        logging.getLogger("gptlab.x").warning("%s", HOSTILE)
    finally:
        logging.getLogger().removeHandler(handler)
    assert controls(written.getvalue()) == set()
    assert "\\x1b]52" in written.getvalue()


def on_terminal(work) -> str:
    """Runs ``work`` in a child process whose stdout is a terminal, and returns what the terminal receives."""
    pid, terminal = pty.fork()
    if pid == 0:
        try:
            sys.stdout = os.fdopen(1, "w", encoding="utf-8", newline="\n", closefd=False)
            work()
            sys.stdout.flush()
        finally:
            os._exit(0)
    received = b""
    try:
        while chunk := os.read(terminal, 4096):
            received += chunk
    except OSError:  # the child has ended
        pass
    os.waitpid(pid, 0)
    os.close(terminal)
    return received.decode().replace("\r\n", "\n")


def test_a_sequence_split_over_tokens_does_not_reach_a_terminal():
    pieces = (*"\x1b", "]", "52;c;", "Y3VybA==", "\x07", "\x9b", "2J", "\n")
    assert controls(on_terminal(lambda: [print(piece, end="", flush=True) for piece in pieces])), "no effect"
    received = on_terminal(lambda: [print_data(piece, end="") for piece in pieces])
    assert received == "\\x1b]52;c;Y3VybA==\\x07\\x9b2J\n"


def test_text_written_to_a_file_is_unchanged(screen):
    print_data(HOSTILE)
    assert screen() == f"{HOSTILE}\n"


def test_a_hostile_run_directory_is_listed_and_reported_without_control_sequences(user):
    # YAML and JSON files with these escapes are valid
    name = "a\x1b[2Jb\x9b2Jc"
    write_run(user.folder / "outputs" / "a" / "1", settings={"name": name}, message=name)
    (write_run(user.folder / "outputs" / "a" / "\x1b[2J2") / "config.yaml").write_text("[")
    assert yaml.safe_load((user.folder / "outputs/a/1/config.yaml").read_text())["name"] == name
    done = user.python("gptlab.runs", "columns=[name]")
    assert done.returncode == 0
    assert "\\x1b[2J" in done.stdout
    assert "\\x1b[2J2 is omitted" in done.stderr
    assert controls(done.stdout + done.stderr) == set()


@pytest.fixture
def hooks(monkeypatch) -> None:
    """Undoes ``install_hooks`` at the end of a test."""
    for module, name in ((sys, "stdout"), (sys, "stderr"), (sys, "excepthook"), (threading, "excepthook")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second one for LC_ALL=C
@pytest.mark.parametrize("encoding", ["ascii", "latin1", "cp1252"])
def test_text_that_the_terminal_cannot_encode_is_shown_as_escapes(hooks, monkeypatch, encoding, errors):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding, errors)
    with pytest.raises(UnicodeEncodeError):
        stdout.write("世")
    monkeypatch.setattr(sys, "stdout", stdout)
    install_hooks()
    print_data("step 1 · 世 🙂")
    stdout.flush()
    dot = "·" if encoding != "ascii" else "\\xb7"
    assert stdout.buffer.getvalue().decode(encoding) == f"step 1 {dot} \\u4e16 \\U0001f642\n"


def open_full_disk() -> TextIO:
    return open("/dev/full", "w")  # noqa: PTH123


def open_closed_pipe() -> TextIO:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


@pytest.mark.parametrize("output", [open_full_disk, open_closed_pipe])
def test_output_that_cannot_be_written_is_dropped(hooks, monkeypatch, output):
    with pytest.raises(OSError), output() as stdout:  # noqa: PT011
        print("text", file=stdout)
    with output() as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        install_hooks()
        print_data("text")
        sys.stdout.flush()
        if output is open_full_disk:  # commands whose result is their output end with this error
            with pytest.raises(UserError, match="Standard output could not be written: no space left on device"):
                check_output_is_written()
        else:
            check_output_is_written()


def test_output_is_written_whole(hooks, monkeypatch, tmp_path):
    with (tmp_path / "output.txt").open("w", encoding="ascii") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        install_hooks()
        for number in range(5000):
            print_data(f"{number} 世")
        sys.stdout.flush()
    assert (tmp_path / "output.txt").read_text() == "".join(f"{number} \\u4e16\n" for number in range(5000))
