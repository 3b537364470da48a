"""The log files of a stack's processes: followed, read for people, and kept small. Processes write them themselves."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

import orjson

LEVELS: Final = ("debug", "info", "warning", "error", "critical")
LOG_BYTES_MAX: Final = 32 << 20

_FOLLOW_SECONDS: Final = 0.1
_TRIM_SECONDS: Final = 10.0
_READ_BYTES_MAX: Final = 1 << 20
# What every line of a process says of itself.
_OF_THE_PROCESS: Final = frozenset({"event", "level", "timestamp", "service", "instance"})
# What a foreign server's line is taken for when it holds the word.
_FOREIGN: Final = (
    (" FATAL:  the database system is ", "info"),
    (" FATAL:  terminating connection ", "info"),
    (" LOG:  ", "info"),
    (" ERROR:  ", "error"),
    (" FATAL:  ", "error"),
    (" PANIC:  ", "critical"),
    (" WARNING:  ", "warning"),
    (" DETAIL:  ", "info"),
    (" HINT:  ", "info"),
    (" STATEMENT:  ", "info"),
    (" CONTEXT:  ", "info"),
)


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of one process's log."""

    label: str
    level: str
    time: str
    text: str
    detail: str = ""
    fields: dict[str, str] = field(default_factory=dict)

    def reaches(self, least: str) -> bool:
        """Whether it is at least as grave as the level."""
        return LEVELS.index(self.level) >= LEVELS.index(least)


def parse(label: str, line: str) -> LogLine:
    """A line as its process meant it; a line of a foreign server, or of an interpreter that died, as it stands."""
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict) or "event" not in found:
        return LogLine(label, _foreign_level(label, line), "", line)
    level = str(found.get("level", "info"))
    detail = str(found.pop("exception", ""))
    fields = {name: str(value) for name, value in found.items() if name not in _OF_THE_PROCESS}
    time = _local_time(str(found.get("timestamp", "")))
    return LogLine(label, level if level in LEVELS else "info", time, str(found["event"]), detail, fields)


async def follow(folder: Path) -> AsyncIterator[LogLine]:
    """Every line that is written to the folder's logs from now on, a tenth of a second later at most."""
    offsets = {path: _size(path) for path in _logs(folder)}
    while True:
        for path in _logs(folder):
            for line in _new_lines(path, offsets):
                yield parse(path.stem, line)
        await asyncio.sleep(_FOLLOW_SECONDS)


async def trim(folder: Path) -> None:
    """Keeps every log below a bound and its former part beside it. Writers append, so they go on undisturbed."""
    while True:
        await asyncio.to_thread(_trim_now, folder)
        await asyncio.sleep(_TRIM_SECONDS)


def _trim_now(folder: Path) -> None:
    for path in _logs(folder):
        if _size(path) > LOG_BYTES_MAX:
            shutil.copyfile(path, path.with_suffix(".old"))
            path.open("wb").close()


def _logs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.log"))


def _size(path: Path) -> int:
    return path.stat().st_size


def _new_lines(path: Path, offsets: dict[Path, int]) -> list[str]:
    """Whole lines after the offset, which moves past them; a log that shrank was trimmed."""
    offset = offsets.get(path, 0)
    size = _size(path)
    if size < offset:
        offset = offsets[path] = 0
    if size == offset:
        return []
    with path.open("rb") as file:
        file.seek(offset)
        read = file.read(_READ_BYTES_MAX)
    whole, newline, _ = read.rpartition(b"\n")
    if not newline:
        # A line longer than what is read at once is shown in parts.
        whole = read if len(read) == _READ_BYTES_MAX else b""
        newline = b""
    offsets[path] = offset + len(whole) + len(newline)
    return whole.decode(errors="replace").splitlines()


def _foreign_level(label: str, line: str) -> str:
    if label in ("postgres", "redis"):
        return next((level for word, level in _FOREIGN if word in line), "info")
    return "warning" if line.strip() else "debug"


def _local_time(timestamp: str) -> str:
    try:
        return datetime.fromisoformat(timestamp).astimezone().strftime("%H:%M:%S")
    except ValueError:
        return ""
