"""What the tests of supervised processes share: a supervisor around one process, and a record of what it was told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import psutil
from mainspring.dev.child import Child
from mainspring.dev.start import parent_pipe
from mainspring.embedded.launch import Launch


@dataclass
class Record:
    """Remembers what it was told of a child."""

    starts: list[int] = field(default_factory=list)
    serves: list[int] = field(default_factory=list)
    ends: list[tuple[int, float]] = field(default_factory=list)

    def started(self, child: Child) -> None:
        self.starts.append(child.pid or 0)

    def serving(self, child: Child, *, seconds: float) -> None:
        self.serves.append(child.pid or 0)

    def ended(self, child: Child, *, returncode: int, restart_seconds: float) -> None:
        self.ends.append((returncode, restart_seconds))


@asynccontextmanager
async def supervised(what: Launch, record: Record) -> AsyncIterator[Child]:
    with parent_pipe() as parent_fd:
        child = Child(what, parent_fd=parent_fd, owner=record)
        async with asyncio.TaskGroup() as tasks:
            supervisor = tasks.create_task(child.supervise())
            try:
                yield child
            finally:
                await child.stop()
                supervisor.cancel()


def lives(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
