"""Tables as people see them: in a narrow terminal what is to be copied stays whole, and prose gives way."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
from mainspring.cli.output import EventPrinter, print_table
from mainspring.client import Delta, Event
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


def told(*, is_terminal: bool, shows: Sequence[Delta | Event]) -> list[str]:
    """The lines that a printer makes of events and text."""
    file = io.StringIO()
    printer = EventPrinter(Console(file=file, width=200, force_terminal=is_terminal, color_system=None))
    for shown in shows:
        if isinstance(shown, Delta):
            printer.show_text(shown)
        else:
            printer.show(shown)
    return file.getvalue().splitlines()


def happened(kind: str, run_id: str = "r", **data: object) -> Event:
    return Event(kind, run_id, 1, data, {"event_time": "2026-11-24T10:00:00.000Z", "agent": "helper"})


SAID: Sequence[Delta | Event] = [
    happened("agent_started", agent_version="1", input={}),
    Delta("r", 1, 0, "Hello"),
    Delta("r", 1, 2, "llo, "),
    Delta("r", 1, 99, "a hole"),
    happened("tool_completed", tool="t", result=1),
    Delta("r", 1, 7, "world"),
    Delta("r", 1, 0, "Again"),
    happened("agent_thinking", text="Again."),
    Delta("r", 2, 0, "More"),
]


def test_text_is_shown_as_it_comes_between_the_events() -> None:
    lines = told(is_terminal=True, shows=SAID)
    assert [line.strip() for line in lines[1:7] if " s " not in line] == ["Hello,", "world", "Again", "More"]
    assert [number for number, line in enumerate(lines) if " s " in line] == [0, 2, 5]


def test_where_nobody_looks_the_event_has_the_text() -> None:
    assert [line.split()[2] for line in told(is_terminal=False, shows=SAID)] == [
        "agent_started",
        "tool_completed",
        "agent_thinking",
    ]


def test_a_run_below_is_set_in_under_its_agent() -> None:
    lines = told(is_terminal=False, shows=[happened("agent_started"), happened("agent_started", "below")])
    assert "└ helper: agent_started" in lines[1] and "└" not in lines[0]
