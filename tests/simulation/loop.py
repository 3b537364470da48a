"""An event loop without a clock of its own: virtual time, one ready queue, processes that stop between two steps."""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from collections import deque
from collections.abc import Callable
from typing import Any, Final

# Any in this module: callbacks, their arguments and what coroutines return are asyncio's own affair.

PROCESS: Final[contextvars.ContextVar[Process]] = contextvars.ContextVar("simulated_process")


# So many steps at one moment, and nothing waits for anything any more.
STEPS_MAX: Final = 20_000


class LivelockError(BaseException):
    """A history goes round in circles."""


class Process:
    """What runs in one address space. Everything it does runs in its context, so that a kill can stop all of it."""

    def __init__(self, name: str, *, clock_skew: float = 0.0) -> None:
        self.name = name
        self.clock_skew = clock_skew
        self.is_alive = True
        self.is_paused = False
        # Messages to and from it arrive after this second.
        self.stalled_until = 0.0
        self.steps = 0
        # The kill comes before this step; 0: never.
        self.last_step = 0
        self.context = contextvars.copy_context()
        self.context.run(PROCESS.set, self)

    def __repr__(self) -> str:
        return self.name


def _copied(context: contextvars.Context | None) -> contextvars.Context:
    """The caller's where none is given; nobody's is empty, and as good as any."""
    return contextvars.copy_context() if context is None else context


class Handle:
    """A callback that is due now or later."""

    __slots__ = ("_when", "args", "callback", "context", "is_cancelled", "process")

    def __init__(
        self, callback: Callable[..., object], args: tuple[Any, ...], *, when: float, context: contextvars.Context
    ) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.process: Process | None = context.get(PROCESS)
        self.is_cancelled = False
        self._when = when

    def cancel(self) -> None:
        """It is not called any more."""
        self.is_cancelled = True

    def cancelled(self) -> bool:
        """Whether it was."""
        return self.is_cancelled

    def when(self) -> float:
        """The virtual second at which it is due."""
        return self._when


class SimLoop(asyncio.AbstractEventLoop):
    """Runs whatever is ready in order, then lets time jump to the next timer."""

    def __init__(self, *, step_seconds: float = 0.0) -> None:
        self.now = 0.0
        self.step_seconds = step_seconds
        self.errors: list[str] = []
        self.on_kill: Callable[[Process], None] = lambda process: None
        self.is_reaping = False
        self.is_over = False
        self.current: Process | None = None
        self._ready: deque[Handle] = deque()
        self._timers: list[tuple[float, int, Handle]] = []
        self._number = 0
        self._tasks: list[asyncio.Task[Any]] = []
        # What processes that are stopped or dead would do.
        self._held: list[Handle] = []

    def stop(self) -> None:
        self.is_over = True

    def time(self) -> float:
        return self.now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(  # type: ignore[override]  # a handle of our own has what asyncio asks of one
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        handle = Handle(callback, args, when=self.now, context=_copied(context))
        self._ready.append(handle)
        return handle

    def call_at(  # type: ignore[override]  # as above
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        handle = Handle(callback, args, when=when, context=_copied(context))
        self._number += 1
        heapq.heappush(self._timers, (when, self._number, handle))
        return handle

    def call_later(  # type: ignore[override]  # as above
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Any, *, name: str | None = None, context: contextvars.Context | None = None
    ) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name or "", context=context)
        self._tasks.append(task)
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self.is_reaping:
            self.errors.append(f"{context.get('message')}: {context.get('exception')!r}")

    def run_until(self, moment: float) -> None:
        """Runs what is due until this virtual second, or until `is_over` is set."""
        asyncio._set_running_loop(self)
        try:
            while self._run_ready():
                if self.is_over or not self._timers or self._timers[0][0] > moment:
                    return
                self.now = max(self.now, self._timers[0][0])
                self._wake_timers()
        finally:
            asyncio._set_running_loop(None)

    def reap(self) -> None:
        """Ends every task of every process, so that nothing outlives its history."""
        self.is_reaping = True
        self._ready.extend(self._held)
        asyncio._set_running_loop(self)
        try:
            for _ in range(10):
                live = [task for task in self._tasks if not task.done()]
                if not live:
                    break
                for task in live:
                    task.cancel()
                self._run_ready()
        finally:
            asyncio._set_running_loop(None)
        self._timers.clear()
        self._tasks.clear()

    def _wake_timers(self) -> None:
        timers, ready = self._timers, self._ready
        while timers and timers[0][0] <= self.now:
            handle = heapq.heappop(timers)[2]
            if not handle.is_cancelled:
                ready.append(handle)

    def _run_ready(self) -> bool:
        """Until nothing is ready. A step takes a moment, so that messages arrive between the steps of one turn."""
        ready = self._ready
        steps = 0
        while ready:
            handle = ready.popleft()
            steps += 1
            if steps > STEPS_MAX:
                raise LivelockError(f"{handle.process} does not stop: {handle.callback}")
            if handle.is_cancelled:
                continue
            process = handle.process
            if process is not None and not self.is_reaping:
                if process.is_paused or not process.is_alive:
                    self._held.append(handle)
                    continue
                process.steps += 1
                if process.steps == process.last_step:
                    self.on_kill(process)
                    self._held.append(handle)
                    continue
            self.current = process
            handle.context.run(handle.callback, *handle.args)
            if self.step_seconds and not self.is_reaping:
                self.now += self.step_seconds
                self._wake_timers()
        self.current = None
        return True

    def resume(self, process: Process) -> None:
        """A stopped process goes on, with all that has become due meanwhile."""
        process.is_paused = False
        held, self._held = self._held, []
        for handle in held:
            (self._ready if handle.process is process else self._held).append(handle)
