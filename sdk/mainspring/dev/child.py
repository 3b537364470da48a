"""One supervised process: started, watched, started again when it dies, held down or stopped when told to."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from mainspring.embedded.launch import Launch, StartError

# A process that lived this long has earned an immediate restart; the others wait longer each time.
STEADY_SECONDS: Final = 3.0
RESTART_SECONDS_MAX: Final = 10.0
STOP_SECONDS_MAX: Final = 10.0

_RESTART_SECONDS_FIRST: Final = 0.5
_LOG_TAIL_BYTES: Final = 4_000


class Owner(Protocol):
    """Who is told what becomes of a process."""

    def started(self, child: Child) -> None:
        """It has a pid."""

    def serving(self, child: Child, *, seconds: float) -> None:
        """It serves, so long after its start."""

    def ended(self, child: Child, *, returncode: int, restart_seconds: float) -> None:
        """It died unasked and starts again after so long."""


class Child:
    """A process that is kept running. Its first life must come to serve, or `supervise` raises StartError."""

    def __init__(self, launch: Launch, *, parent_fd: int, owner: Owner) -> None:
        self.launch = launch
        self.serving = asyncio.Event()
        self.process: asyncio.subprocess.Process | None = None
        self._parent_fd = parent_fd
        self._owner = owner
        self._wanted = asyncio.Event()
        self._wanted.set()
        self._spawning = asyncio.Lock()
        self._has_served = False

    @property
    def pid(self) -> int | None:
        """The process's, while it lives."""
        return self.process.pid if self.process is not None and self.process.returncode is None else None

    async def supervise(self) -> None:
        """Keeps the process running until cancelled; whoever cancels stops it first."""
        restart_seconds = 0.0
        while True:
            await self._wanted.wait()
            started = time.monotonic()
            returncode = await self._live(started)
            if not self._wanted.is_set():
                continue
            if not self._has_served:
                raise StartError(f"{self.launch.label} {_ending(returncode)} before it served. {self._last_words()}")
            if time.monotonic() - started >= STEADY_SECONDS:
                restart_seconds = 0.0
            self._owner.ended(self, returncode=returncode, restart_seconds=restart_seconds)
            await asyncio.sleep(restart_seconds)
            restart_seconds = min(max(restart_seconds * 2, _RESTART_SECONDS_FIRST), RESTART_SECONDS_MAX)

    async def signal(self, number: signal.Signals) -> None:
        """Sends a signal and, where it ends the process for certain, waits for that end."""
        process = self.process
        if process is None or process.returncode is not None:
            return
        is_fatal = number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
        if is_fatal:
            # Now, not when the death is noticed: who then waits for `serving` waits for the next life.
            self.serving.clear()
        with suppress(ProcessLookupError):
            process.send_signal(number)
        if is_fatal:
            await process.wait()

    def resume(self) -> None:
        """Takes back a `stop`."""
        self._wanted.set()

    async def stop(self, *, seconds: float = STOP_SECONDS_MAX) -> None:
        """Ends the process, with ever stronger signals, and keeps it down."""
        self._wanted.clear()
        self.serving.clear()
        async with self._spawning:
            process = self.process
        if process is None:
            return
        for number in (self.launch.stop_signal, self.launch.hard_stop_signal, signal.SIGKILL):
            if process.returncode is not None:
                return
            with suppress(ProcessLookupError, TimeoutError):
                process.send_signal(number)
                async with asyncio.timeout(seconds):
                    await process.wait()

    async def _live(self, started: float) -> int:
        async with self._spawning:
            if not self._wanted.is_set():
                return 0
            self.launch.before()
            process = self.process = await self._spawn()
        self._owner.started(self)
        try:
            async with asyncio.TaskGroup() as tasks:
                announcement = tasks.create_task(self._announce(process, started))
                returncode = await process.wait()
                announcement.cancel()
        finally:
            self.serving.clear()
        return returncode

    async def _spawn(self) -> asyncio.subprocess.Process:
        is_ours = self.launch.watches_parent
        inherited = {"MAINSPRING_PARENT_FD": str(self._parent_fd)} if is_ours else {}
        with self.launch.log.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal reaches only the supervisor, which stops all in order.
            return await asyncio.create_subprocess_exec(
                *self.launch.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self.launch.env, **inherited},
                pass_fds=(self._parent_fd,) if is_ours else (),
                start_new_session=True,
            )

    async def _announce(self, process: asyncio.subprocess.Process, started: float) -> None:
        while True:
            try:
                await self.launch.ready(process.pid)
                break
            except TimeoutError as error:
                # Later it may have to wait for another that is down: that is no reason to end it.
                if not self._has_served:
                    raise StartError(f"{self.launch.label} runs but does not serve. {self._last_words()}") from error
        self._has_served = True
        self.serving.set()
        self._owner.serving(self, seconds=time.monotonic() - started)

    def _last_words(self) -> str:
        return f"Its log {self.launch.log} ends with:\n{tail(self.launch.log)}"


def tail(log: Path) -> str:
    """The last lines of a log, for people."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-20:]) or "  (nothing)"


def _ending(returncode: int) -> str:
    if returncode < 0:
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"ended with exit code {returncode}"
