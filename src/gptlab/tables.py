"""Tables that fit the width of the terminal without breaking a number or a name. Imports no torch."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from gptlab.terminal import get_console, printable

UNLIMITED = 1_000_000  # characters


class _Column(NamedTuple):
    heading: str
    justify: Literal["left", "right"]
    style: str
    wraps: bool
    drop_order: int | None


class _Row(NamedTuple):
    cells: Sequence[Text]
    style: str | None
    begins_section: bool


class FittingTable:
    """Table for rich's console. If it is too wide, its least needed columns are omitted; a line below names them.

    Headings wrap at spaces, and cells only in columns of prose. If the columns that are never omitted are too wide, the
    lines are longer than the terminal, so that a name can still be copied.

    Args:
        title: Title in bold, or "" for none.
        show_header: Whether the table has headings.
        see_also: Where the omitted columns can be read, as in "answers.csv has all columns.".
    """

    def __init__(self, title: str = "", *, show_header: bool = True, see_also: str = "") -> None:
        self.title, self.show_header, self.see_also = title, show_header, see_also
        self._columns: list[_Column] = []
        self._rows: list[_Row] = []
        self._begins_section = False

    def add_column(
        self,
        heading: str = "",
        justify: Literal["left", "right"] = "left",
        *,
        style: str = "",
        wraps: bool = False,
        drop_order: int | None = None,
    ) -> None:
        """Adds a column.

        Args:
            heading: Heading; text, not rich's markup.
            justify: Alignment of heading and cells.
            style: Style of the cells.
            wraps: Whether the cells are prose, which wraps at spaces.
            drop_order: The column with the lowest number is omitted first. None: the column is never omitted.
        """
        self._columns.append(_Column(printable(heading), justify, style, wraps, drop_order))

    def add_row(self, *cells: str | Text, style: str | None = None) -> None:
        """Adds a row; missing cells are empty. A cell is text, not rich's markup."""
        texts = [Text(printable(str(cell)), cell.style if isinstance(cell, Text) else "") for cell in cells]
        texts += [Text("")] * (len(self._columns) - len(texts))
        self._rows.append(_Row(texts, style, self._begins_section))
        self._begins_section = False

    def add_section(self) -> None:
        """Separates the next row from the rows before it."""
        self._begins_section = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Renders the table, without spaces at the ends of lines."""
        shown, needed = self._fit(console, options, options.max_width)
        widths = self._widths(console, options, shown, options.max_width - needed)
        table = self._build(shown, widths)
        wide = options.update(width=max(options.max_width, needed))
        if self.title:
            yield Text(self.title, "bold")
        for line in console.render_lines(table, wide, pad=False):
            yield from _without_trailing_spaces(line)
            yield Segment.line()
        if len(shown) < len(self._columns):
            yield Text(self._omission(console, options, shown), "dim")

    def _fit(self, console: Console, options: ConsoleOptions, width: int) -> tuple[list[int], int]:
        """Returns the numbers of the columns that fit, and the width that they need."""
        shown = list(range(len(self._columns)))
        orders = {number: order for number in shown if (order := self._columns[number].drop_order) is not None}
        for dropped in (*sorted(orders, key=lambda number: (orders[number], -number)), None):
            needed = self._needed(console, options, shown)
            if needed <= width or dropped is None:
                break
            shown.remove(dropped)
        return shown, needed

    def _needed(self, console: Console, options: ConsoleOptions, shown: Iterable[int]) -> int:
        """Returns the smallest width of a table with some of the columns."""
        widths = {number: self._measure(console, options, number).minimum for number in shown}
        return Measurement.get(console, options.update(max_width=UNLIMITED), self._build(shown, widths)).maximum

    def _measure(self, console: Console, options: ConsoleOptions, number: int) -> Measurement:
        """Returns the smallest width of a column that breaks no word, and the width without any wrapped cell."""
        column, wide = self._columns[number], options.update(max_width=UNLIMITED)
        cells = [Measurement.get(console, wide, row.cells[number]) for row in self._rows]
        heading = Measurement.get(console, wide, Text(column.heading if self.show_header else ""))
        least = [cell.minimum if column.wraps else cell.maximum for cell in cells]
        return Measurement(
            max([heading.minimum, *least, 1]), max([heading.maximum, *(cell.maximum for cell in cells), 1])
        )

    def _widths(self, console: Console, options: ConsoleOptions, shown: Sequence[int], spare: int) -> dict[int, int]:
        """Returns the widths of the columns: the smallest ones, plus equal shares of the spare width."""
        measured = {number: self._measure(console, options, number) for number in shown}
        widths = {}
        growing = sorted(shown, key=lambda number: measured[number].span)
        for position, number in enumerate(growing):
            grown = min(measured[number].span, max(spare, 0) // (len(growing) - position))
            widths[number] = measured[number].minimum + grown
            spare -= grown
        return widths

    def _build(self, shown: Iterable[int], widths: dict[int, int]) -> Table:
        table = Table(box=box.SIMPLE, show_header=self.show_header, collapse_padding=True, pad_edge=False)
        shown = list(shown)
        for number in shown:
            column = self._columns[number]
            table.add_column(Text(column.heading), justify=column.justify, style=column.style, width=widths[number])
        for row in self._rows:
            if row.begins_section:
                table.add_section()
            table.add_row(*(row.cells[number] for number in shown), style=row.style)
        return table

    def _omission(self, console: Console, options: ConsoleOptions, shown: Sequence[int]) -> str:
        """Names the columns that are not shown, and how to see them."""
        omitted = [" ".join(column.heading.split()) for n, column in enumerate(self._columns) if n not in shown]
        needed = self._needed(console, options, range(len(self._columns)))
        return (
            f"Omitted: {', '.join(omitted)}. All columns need a terminal of width {needed}, or COLUMNS={needed}."
            f"{' ' * bool(self.see_also)}{self.see_also}\n"
        )


def key_value_table(rows: Iterable[tuple[str, str]], title: str = "") -> FittingTable:
    """Returns a table of names and values without headings; values wrap at spaces."""
    table = FittingTable(title, show_header=False)
    table.add_column(style="bold")
    table.add_column(wraps=True)
    for row in rows:
        table.add_row(*row)
    return table


def print_table(table: FittingTable) -> None:
    """Prints a table to the console. Lines that are too long for the terminal are not cropped."""
    get_console().print(table, crop=False)


def _without_trailing_spaces(line: Sequence[Segment]) -> list[Segment]:
    kept = list(line)
    while kept and not kept[-1].text.strip():
        kept.pop()
    return [*kept[:-1], kept[-1]._replace(text=kept[-1].text.rstrip())] if kept else []
