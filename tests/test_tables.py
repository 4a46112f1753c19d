"""Tables at narrow widths: no number or name is broken, and the least needed columns are omitted."""

import io

import pytest
from rich.console import Console

from gptlab.tables import FittingTable, key_value_table

NAMES = ["lr/2026-11-30_16-37-30/15", "quickstart/2026-11-30_16-35-14"]
ROWS = [(NAMES[0], "1.0977", "40,058", "better than the baseline"), (NAMES[1], "3.9925", "4,377", "[bold]worse")]


def example() -> FittingTable:
    table = FittingTable("Runs", see_also="format=csv has all columns.")
    table.add_column("run")
    table.add_column("best val loss", "right", drop_order=2)
    table.add_column("tokens/s", "right", drop_order=1)
    table.add_column("verdict", wraps=True)
    for row in ROWS:
        table.add_row(*row)
    return table


def screen(table: FittingTable, width: int) -> str:
    """Returns what a terminal of this width shows."""
    output = io.StringIO()
    Console(file=output, width=width).print(table, crop=False)
    return output.getvalue()


@pytest.mark.parametrize("width", range(10, 121))
def test_no_number_or_name_is_broken_at_any_width(width):
    shown = screen(example(), width)
    drawn = shown.partition("Omitted")[0]
    words = {word for row in ROWS for cell in row for word in cell.split()} | {"Runs", "run", "best", "val", "loss"}
    words |= {"tokens/s", "verdict"}
    assert {word for word in drawn.split() if set(word) != {"─"}} <= words
    assert all(name in drawn for name in NAMES)
    for heading, cell in (("tokens/s", "40,058"), ("best val loss", "1.0977")):  # either shown or named below
        assert (cell in drawn) != (heading in " ".join(shown.partition("Omitted")[2].split()))


def test_the_columns_with_the_lowest_drop_order_are_omitted_first():
    counts = [("1.0977" in (shown := screen(example(), width)), "40,058" in shown) for width in range(120, 0, -1)]
    assert list(dict.fromkeys(counts)) == [(True, True), (True, False), (False, False)]


def test_a_table_uses_the_width_that_it_names_for_all_columns():
    needed = int(screen(example(), 50).partition("COLUMNS=")[2].partition(".")[0])
    assert "Omitted" in screen(example(), needed - 1)
    assert "Omitted" not in screen(example(), needed)
    assert max(map(len, screen(example(), needed).splitlines())) <= needed


def test_lines_fit_the_terminal():
    for line in screen(example(), 60).splitlines():
        assert len(line) <= 60


def test_the_lines_of_a_table_have_no_trailing_spaces():
    assert [line for line in screen(example(), 120).splitlines() if line.endswith(" ")] == []


def test_escaped_control_characters_are_part_of_the_width():
    table = key_value_table([("name", "a\x1b[2Jb")])
    assert screen(table, 80) == "\n name  a\\x1b[2Jb\n\n"


def test_values_of_a_key_value_table_wrap_at_spaces_only():
    shown = screen(key_value_table([("steps", "1,200 of 12 sequences of 128 tokens"), ("run", NAMES[1])]), 30)
    assert NAMES[1] in shown
    assert "1,200 of" in shown
    assert "Omitted" not in shown
