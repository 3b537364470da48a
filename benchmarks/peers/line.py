"""The peer's end of the line protocol. It runs in the peer's own interpreter: it imports the standard library only.

One JSON object a line, until standard input ends. `{"op": "prepare", …}` (the fields of `Order`) is answered by
`{"pids": {name: [pid]}, "versions": {package: version}}`. `{"op": "run", …}` (the fields of `Wanted`) is answered by
`{"phase": "begun"}` when every caller has ended a run, by `{"phase": "ended"}` when time is up and every caller has
ended another, and, when all runs have ended, by `{"seconds": 2.0, "durations": [seconds], "faults": [text]}`, where a
duration is of a run that ended between the two. So runs that keep in step, as behind a lock, are counted whole bursts
at a time. Whatever fails is answered by `{"error": text}`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final

# What the look-up of W1 is asked for, and what it answers.
QUESTION: Final = "forty-two"
FAULTS_MAX: Final = 10

OneRun = Callable[[], Awaitable[object]]
Say = Callable[[Mapping[str, Any]], None]  # Any: JSON


@dataclass(frozen=True, slots=True)
class Order:
    """What a platform is prepared with: databases and a folder of its own, and the most callers it gets."""

    database_url: str
    redis_url: str
    folder: str
    callers: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """A slice: callers back to back, each wait for all of them, and for their last runs, with a limit."""

    variant: str
    callers: int
    seconds: float
    wait_seconds: float
    drain_seconds: float


@dataclass(frozen=True, slots=True)
class Prepared:
    """A platform that serves: one run of each variant, returning its answer, and the processes that do the work."""

    variants: Mapping[str, OneRun]
    pids: Mapping[str, Sequence[int]]


Prepare = Callable[[Order], AbstractAsyncContextManager[Prepared]]


def serve(prepare: Prepare, packages: Sequence[str], *, runner: asyncio.Runner) -> None:
    """Answers until standard input ends, then closes what `prepare` opened. `packages`: those whose versions count."""
    with _own_output() as say, runner:
        runner.run(_answer_all(prepare, packages, say))


async def _answer_all(prepare: Prepare, packages: Sequence[str], say: Say) -> None:
    async with AsyncExitStack() as held:
        prepared = Prepared({}, {})
        while line := await asyncio.to_thread(sys.stdin.readline):
            fields = json.loads(line)
            try:
                if fields.pop("op") == "prepare":
                    prepared = await held.enter_async_context(prepare(Order(**fields)))
                    pids = {name: list(numbers) for name, numbers in prepared.pids.items()}
                    say({"pids": pids, "versions": {package: version(package) for package in packages}})
                else:
                    wanted = Wanted(**fields)
                    say(await measure(prepared.variants[wanted.variant], wanted, say=say))
            except Exception as error:  # the root of this process: the harness tells what went wrong
                say({"error": _innermost(error)})


async def measure(one_run: OneRun, wanted: Wanted, *, say: Say) -> dict[str, Any]:
    """A slice, as the protocol answers it. Any: JSON."""
    counter = _Counter(wanted.callers)
    try:
        async with asyncio.timeout(None) as limit, asyncio.TaskGroup() as tasks:
            for number in range(wanted.callers):
                tasks.create_task(counter.call(one_run, number))
            await counter.await_everyone(wanted.wait_seconds)
            say({"phase": "begun"})
            counter.restart()
            start = time.perf_counter()
            await asyncio.sleep(wanted.seconds)
            counter.forget_who_ended()  # the slice ends as it began, with everybody's run, not within a burst
            await counter.await_everyone(wanted.wait_seconds)
            counted, elapsed = list(counter.durations), time.perf_counter() - start
            say({"phase": "ended"})
            counter.is_over = True
            limit.reschedule(asyncio.get_running_loop().time() + wanted.drain_seconds)
    except TimeoutError:
        counter.faults.append(f"runs had not ended {wanted.drain_seconds:g} s after the slice: they were given up")
    return {"seconds": elapsed, "durations": counted, "faults": counter.faults[:FAULTS_MAX]}


class _Counter:
    """Callers back to back, and what they have seen since the last `restart`."""

    def __init__(self, callers: int) -> None:
        self.durations: list[float] = []
        self.faults: list[str] = []
        self.is_over = False
        self._callers = callers
        self._ended: set[int] = set()
        self._changed = asyncio.Event()

    def restart(self) -> None:
        self.durations = []
        self.forget_who_ended()

    def forget_who_ended(self) -> None:
        self._ended.clear()

    async def await_everyone(self, seconds: float) -> None:
        """Returns when each caller has ended a run since the last was forgotten, or when that takes too long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while len(self._ended) < self._callers:
                    self._changed.clear()
                    await self._changed.wait()

    async def call(self, one_run: OneRun, number: int) -> None:
        while not self.is_over:
            start = time.perf_counter()
            answer = await one_run()
            if answer == QUESTION:
                self.durations.append(time.perf_counter() - start)
            else:
                self.faults.append(f"a run answered {answer!r}")
            self._ended.add(number)
            self._changed.set()


def _innermost(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


@contextmanager
def _own_output() -> Iterator[Say]:
    """Standard output for the protocol alone: what libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)

        def say(message: Mapping[str, Any]) -> None:  # Any: JSON
            output.write(json.dumps(message) + "\n")
            output.flush()

        yield say
