"""What `mainspring dev` shows: the steps of the start, the address and the token, deaths and restarts, and the logs."""

from __future__ import annotations

import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.text import Text

from mainspring.dev.child import Child
from mainspring.dev.logs import LogLine
from mainspring.dev.running import Stack

_COLOURS: Final = {
    "gateway": "cyan",
    "execution": "green",
    "dispatcher": "magenta",
    "registry": "blue",
    "state": "yellow",
    "worker": "bright_green",
    "postgres": "bright_blue",
    "redis": "bright_red",
}
_LEVEL_STYLES: Final = {"warning": "yellow", "error": "bold red", "critical": "bold red"}
_WIDTH: Final = 60
_SAME_SECONDS: Final = 10.0
_SHOWN_MAX: Final = 1_000


class Screen:
    """A calm terminal: one line per step, then one per thing worth knowing. Without a terminal the same, plain."""

    def __init__(self, console: Console, *, least_level: str) -> None:
        self._console = console
        self._least_level = least_level
        self._is_up = False
        self._is_stopping = False
        self._shown: dict[tuple[str, str], float] = {}

    def starting(self, data_dir: Path) -> None:
        """The first line."""
        self._console.print(Text.assemble(("Mainspring", "bold"), f" starts; its data is in {data_dir}"))

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Shows that it is under way, where a line can be taken back, and leaves one line of it."""
        started = time.monotonic()
        with self._console.status(f"{what} …") if self._console.is_terminal else nullcontext():
            yield
        seconds = time.monotonic() - started
        self._console.print(Text.assemble("  ", f"{what:<{_WIDTH}}", (f"{seconds:6.2f} s", "dim")), soft_wrap=True)

    def serving(self, child: Child, *, seconds: float) -> None:
        """Says that a process is back; at the start its step says so."""
        if self._is_up and not self._is_stopping:
            self._say(child.launch.label, f"serves again after {seconds:.2f} s, pid {child.pid}")

    def ended(self, child: Child, *, returncode: int, restart_seconds: float) -> None:
        """Says how a process died and when it starts again."""
        how = signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"
        when = "starting it again" if not restart_seconds else f"it keeps dying: next start in {restart_seconds:g} s"
        self._say(child.launch.label, f"died ({how}); {when}. Log: {child.launch.log}", style="yellow")

    def ready(self, stack: Stack, *, seconds: float) -> None:
        """What somebody needs to begin."""
        self._is_up = True
        console = self._console
        console.print(Text(f"Ready in {seconds:.1f} s.", style="bold green"))
        console.print()
        console.print(Text.assemble("  Console   ", (f"{stack.gateway}/", "bold cyan")))
        console.print("  Token     a development key for 7 days: developer, admin of tenant dev")
        console.print(Text(stack.token), soft_wrap=True)
        console.print()
        console.print(Text("  In another terminal here: mainspring tools list, mainspring apply -f FILE"))
        console.print(Text(f"  Logs are in {stack.folder.logs}. Ctrl-C stops everything.", style="dim"), soft_wrap=True)
        console.print()

    def stopping(self) -> None:
        """The start of the end."""
        self._is_stopping = True
        self._console.print("Stopping everything, in order; the data stays.")

    async def show(self, lines: AsyncIterator[LogLine]) -> None:
        """Prints what reaches the level, one process's prefix beside another's."""
        async for line in lines:
            if line.reaches(self._least_level) and not self._is_stopping and self._is_news(line):
                self._console.print(render(line), soft_wrap=True)

    def _is_news(self, line: LogLine) -> bool:
        """Whether the same was not just said: a process that waits for another says so many times a second."""
        now, key = time.monotonic(), (line.label, line.text)
        if now - self._shown.get(key, -_SAME_SECONDS) < _SAME_SECONDS:
            return False
        if len(self._shown) > _SHOWN_MAX:
            self._shown.clear()
        self._shown[key] = now
        return True

    def _say(self, label: str, text: str, *, style: str = "") -> None:
        self._console.print(Text.assemble(_prefix(label), (text, style)), soft_wrap=True)


def render(line: LogLine) -> Text:
    """A log line for people."""
    text = _prefix(line.label)
    if line.time:
        text.append(f"{line.time} ", style="dim")
    if line.level != "info":
        text.append(f"{line.level} ", style=_LEVEL_STYLES.get(line.level, "dim"))
    text.append(line.text)
    for name, value in line.fields.items():
        text.append(f" {name}=", style="dim")
        text.append(value)
    if line.detail:
        # A traceback's last line says what; the log file has it whole.
        text.append(f" {line.detail.splitlines()[-1]}", style="dim")
    return text


def _prefix(label: str) -> Text:
    return Text(f"{label:<12} ", style=_COLOURS.get(label.partition(".")[0], "white"))
