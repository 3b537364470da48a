"""Tables as people see them: in a narrow terminal what is to be copied stays whole, and prose gives way."""

from __future__ import annotations

import io

import pytest
from mainspring.cli.output import print_table
from rich.console import Console

RUN = "01a20f8d-0a3a-7226-929e-5560f4552157"


def printed(rows: list[list[str]], *, width: int, columns: tuple[str, ...] = ("RUN", "AGENT", "LAST")) -> list[str]:
    """The lines in a terminal of this width."""
    file = io.StringIO()
    print_table(columns, rows, empty="None.", console=Console(file=file, width=width))
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [30, 60, 80, 200])
def test_ids_are_whole_in_every_terminal(width: int) -> None:
    lines = printed([[RUN, "cost-optimizer", "session-" + RUN]], width=width)
    assert lines[1] == f"{RUN}  cost-optimizer  session-{RUN}"


def test_prose_is_folded_in_a_narrow_terminal() -> None:
    lines = printed([["a", "b", "many words " * 10]], width=40)
    assert len(lines) > 2
    assert max(map(len, lines)) <= 40


def test_without_rows_there_is_a_word() -> None:
    assert printed([], width=80) == ["None."]
