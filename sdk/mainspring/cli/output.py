"""How commands print: events line by line, tables, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mainspring.client import Delta, Event
from mainspring.narration import describe, event_time

_WIDTH_WITHOUT_TERMINAL: Final = 200
_WIDTH_MAX: Final = 10_000
_STYLES: Final = {
    "agent_started": "cyan",
    "agent_thinking": "",
    "tool_executing": "magenta",
    "tool_completed": "magenta",
    "agent_completed": "bold green",
    "agent_failed": "bold red",
    "agent_timed_out": "bold red",
    "agent_cancelled": "yellow",
    "run_recovered": "yellow",
    "agent_paused": "yellow",
    "agent_resumed": "cyan",
    "agent_waiting": "yellow",
    "approval_requested": "bold yellow",
    "approval_resolved": "cyan",
    "signal_received": "cyan",
    "agent_handed_off": "cyan",
    "attempt_failed": "red",
}


def print_json(value: Any, *, is_line: bool = False) -> None:
    """One JSON value; as one line of several where so asked. Any: JSON."""
    text = json.dumps(value, ensure_ascii=False, indent=None if is_line else 2)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str, console: Console | None = None
) -> None:
    """A table for people, or a word where there is nothing to show."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        # Only the last column, prose, is folded: a name or an id must be there to copy.
        table.add_column(column, overflow="fold", no_wrap=column is not columns[-1])
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = console or (Console() if sys.stdout.isatty() else Console(width=_WIDTH_WITHOUT_TERMINAL))
    if not table.rows:
        console.print(empty)
        return
    # A terminal that is too narrow wraps the line; rich would cut the ids.
    needed = console.measure(table, options=console.options.update(max_width=_WIDTH_MAX)).minimum
    console.width = max(console.width, needed)
    console.print(table, crop=False)


class EventPrinter:
    """Prints a run's events as they come, each with the seconds since the first; those of runs below it set in."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._first: datetime | None = None
        self._run_id = ""
        # Whose text was shown last, the run and its step, how much of it, and whether it stands on a line not ended.
        self._speaker = ("", 0)
        self._shown_characters = 0
        self._is_mid_line = False

    def show(self, event: Event) -> None:
        """One line."""
        now = event_time(event)
        self._first, self._run_id = self._first or now, self._run_id or event.run_id
        seconds = (now - self._first).total_seconds()
        style = _STYLES.get(event.type, "")
        agent = "" if event.run_id == self._run_id else f"  └ {event.frame.get('agent', '')}: "
        line = Text.assemble((f"{seconds:7.3f} s  ", "dim"), agent, (f"{event.type:<18}  ", style), describe(event))
        self._end_line()
        self._console.print(line, soft_wrap=True)

    def show_text(self, delta: Delta) -> None:
        """What a model says while it says it, on a terminal; elsewhere its event has it all."""
        speaker = (delta.run_id, delta.step)
        begins = speaker != self._speaker or not delta.offset
        shown = 0 if begins else self._shown_characters
        fresh = delta.text[shown - delta.offset :]
        if not self._console.is_terminal or delta.offset > shown or not fresh:
            return
        if begins:
            self._end_line()
        self._console.print(Text(fresh, style="dim"), end="", soft_wrap=True)
        self._speaker, self._shown_characters, self._is_mid_line = speaker, shown + len(fresh), True

    def _end_line(self) -> None:
        if self._is_mid_line:
            self._console.print()
            self._is_mid_line = False


def local_time(text: str) -> str:
    """A time of the platform's on this machine's clock."""
    return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S") if text else ""
