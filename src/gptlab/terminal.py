r"""Prints text that may come from somebody else: corpora, samples, configurations, file names, error messages.

A terminal executes control sequences in a text: they set its title or the clipboard, or clear the screen. Therefore
all output goes through this module, which shows control characters as escapes such as \x1b and hides passwords in URLs.
Imports no torch.
"""

import io
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Any, BinaryIO, TextIO, cast

import rich
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from gptlab.errors import UserError, failure_reason, hide_passwords

# C0 except newline and tab, DEL, C1, line separators, bidirectional embeddings, overrides and isolates
# (Boucher and Anderson 2021, Trojan Source), and surrogates, which stand for undecodable bytes of file names.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_controls(text: str) -> str:
    r"""Replaces control characters, except newline and tab, by escapes such as \x1b or \u202e."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable(text: str) -> str:
    """Returns a message with control characters escaped and passwords in URLs hidden."""
    return escape_controls(hide_passwords(text))


def print_message(message: object, file: TextIO | None = None, *, flush: bool = False) -> None:
    """Prints a message, to stdout unless ``file`` is set."""
    print(printable(str(message)), file=file, flush=flush)


def print_data(text: str, end: str = "\n") -> None:
    """Prints data, such as generated text or CSV, to stdout: unchanged, unless stdout is a terminal."""
    print(escape_controls(text) if sys.stdout.isatty() else text, end=end, flush=True)


def get_console() -> Console:
    """Returns rich's console. Control characters are escaped in all that it prints, except in rich's own sequences.

    Text from somebody else is printed as ``rich.text.Text`` or with ``markup=False``, since rich's markup has links.
    """
    console = rich.get_console()
    console.__class__ = _EscapingConsole
    return console


class _EscapingConsole(Console):
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Renders an object; its parts are rendered by this method, too."""
        if isinstance(renderable, str):  # a cell of a table
            options = options or self.options
            renderable = self.render_str(renderable, highlight=options.highlight, markup=options.markup)
        if isinstance(renderable, Text) and (safe := printable(renderable.plain)) != renderable.plain:
            renderable = renderable.copy()
            renderable.plain, renderable.spans = safe, []  # before lines are wrapped, so that nothing is cropped
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escape_controls(segment.text))


class _OptionalOutput(io.FileIO):
    """Standard output or standard error. What cannot be written is dropped, so that output never ends a run.

    For example, the terminal is closed, the pipe to ``head`` is closed, or the file is on a full disk.

    Attributes:
        failure: Error of the last write that failed, if any; a pipe that its reader has closed is no failure.
    """

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Writes bytes; returns their number, also if they are dropped."""
        try:
            return super().write(data)
        except BrokenPipeError:
            pass
        except OSError as error:
            self.failure = error
        return len(memoryview(data))


def check_output_is_written() -> None:
    """Raises UserError if a part of standard output could not be written, for commands whose result is their output."""
    sys.stdout.flush()
    buffer = getattr(sys.stdout, "buffer", None)
    failure = getattr(getattr(buffer, "raw", buffer), "failure", None)
    if failure is not None:
        raise UserError(f"Standard output could not be written: {failure_reason(failure)}.")


def install_hooks() -> None:
    """Makes output optional, in any encoding, and prints uncaught exceptions and warnings through this module."""
    sys.stdout, sys.stderr = _optional(sys.stdout), _optional(sys.stderr)
    sys.excepthook = print_exception
    threading.excepthook = lambda thread: print_exception(thread.exc_type, thread.exc_value, thread.exc_traceback)
    warnings.showwarning = _print_warning


def _optional(stream: TextIO) -> TextIO:
    """Returns a stream to the same file whose failures are ignored; a stream without a file is only reconfigured."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = getattr(stream.buffer, "raw", stream.buffer)  # the buffer itself with python -u
    if type(raw) is not io.FileIO:
        stream.reconfigure(errors="backslashreplace")
        return stream
    stream.flush()
    output = _OptionalOutput(raw.fileno(), "wb", closefd=False)
    buffer = cast(BinaryIO, output if raw is stream.buffer else io.BufferedWriter(output))
    lines, through = stream.line_buffering, stream.write_through
    return io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=lines, write_through=through)


def print_exception(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """Prints an exception and its traceback to stderr."""
    print_message("".join(traceback.format_exception(kind, error, trace)).removesuffix("\n"), file=sys.stderr)


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    formatted = warnings.formatwarning(str(message), category, filename, lineno, line)
    print_message(formatted.removesuffix("\n"), file=file or sys.stderr)
