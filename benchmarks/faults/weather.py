"""The faults: which there are for each target, in what order a seed draws them, and how each is carried out."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import psutil
from mainspring.dev import Stack

from benchmarks.faults.servers import Cache, Database
from benchmarks.harness import progress

PROCESSES: Final = ("state", "execution", "dispatcher", "gateway", "worker")
TARGETS: Final = (*PROCESSES, "postgres", "redis")
STOP_SECONDS: Final = (0.5, 6.0)
WINDOW_SECONDS: Final = (0.5, 4.0)
# Long enough for marked runs to begin and to come to where they are refused.
VALUE_SECONDS: Final = (3.0, 5.0)
# Between the end of a fault, when everything serves again, and the next one.
CALM_SECONDS: Final = (0.5, 2.0)
SERVE_SECONDS: Final = 60.0

_KINDS: Final[Mapping[str, Sequence[str]]] = {
    **dict.fromkeys(PROCESSES, ("kill", "stop", "restart")),
    "postgres": ("kill", "stop", "restart", "terminate", "refuse", "slow", "full", "value"),
    "redis": ("kill", "stop", "restart", "terminate", "refuse"),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """What was done to whom. `begin_time`: when; `since_time`: from when on somebody could have gone on."""

    target: str
    index: int
    kind: str
    begin_time: float
    since_time: float

    @property
    def name(self) -> str:
        """As in `stop state`."""
        return f"{self.kind} {self.target}"


def draw_deck(target: str, chance: random.Random) -> list[tuple[str, str]]:
    """Every fault of the target (`all`: of every target) once, in a drawn order."""
    targets = TARGETS if target == "all" else (target,)
    deck = [(name, kind) for name in targets for kind in _KINDS[name]]
    chance.shuffle(deck)
    return deck


class Weather:
    """Carries out one fault after the other, as the seed has it. `is_refusing`: marked values are refused now."""

    def __init__(self, stack: Stack, target: str, *, seed: int, replicas: Mapping[str, int]) -> None:
        self.faults: list[Fault] = []
        self.is_refusing = False
        self._stack = stack
        self._target = target
        self._chance = random.Random(f"weather {seed}")
        self._replicas = replicas
        self._database = Database(stack.database_url)
        self._cache = Cache(stack.redis_url)
        self._clock = asyncio.get_running_loop().time

    async def rage(self, seconds: float, settle: Callable[[], Awaitable[None]]) -> None:
        """Faults until the time is up; then everything serves again. `settle` waits for what one has queued up."""
        end = self._clock() + seconds
        deck: list[tuple[str, str]] = []
        while True:
            await settle()
            await asyncio.sleep(self._chance.uniform(*CALM_SECONDS))
            if self._clock() >= end:
                return
            deck = deck or draw_deck(self._target, self._chance)
            target, kind = deck.pop()
            await self._strike(target, kind)

    async def _strike(self, target: str, kind: str) -> None:
        index = self._chance.randrange(self._replicas.get(target, 1))
        begin = self._clock()
        progress(f"fault {len(self.faults) + 1}: {kind} {target} {index}")
        since = await self._deeds(target)[kind](target, index)
        self.faults.append(Fault(target, index, kind, begin, since))
        await self._stack.wait_ready(timeout=SERVE_SECONDS)

    def _deeds(self, target: str) -> Mapping[str, Callable[[str, int], Awaitable[float]]]:
        return {
            "kill": self._kill,
            "stop": self._stop,
            "restart": self._restart,
            "terminate": self._terminate,
            "refuse": self._refuse_redis if target == "redis" else self._refuse_postgres,
            "slow": self._slow,
            "full": self._full,
            "value": self._value,
        }

    async def _kill(self, target: str, index: int) -> float:
        begin = self._clock()
        await self._stack.kill(target, index=index)
        if self._goes_on_without(target):
            return begin
        await self._stack.wait_ready(timeout=SERVE_SECONDS)
        return self._clock()

    async def _stop(self, target: str, index: int) -> float:
        """SIGSTOP, then SIGCONT: to the process and what it has started."""
        begin = self._clock()
        family = _suspend(self._stack.pids[target][index])
        try:
            await asyncio.sleep(self._chance.uniform(*STOP_SECONDS))
        finally:
            for process in family:
                _signal(process, signal.SIGCONT)
        return begin if self._goes_on_without(target) else self._clock()

    async def _restart(self, target: str, index: int) -> float:
        begin = self._clock()
        await self._stack.restart(target, index=index)
        return begin if self._goes_on_without(target) else self._clock()

    async def _terminate(self, target: str, _: int) -> float:
        begin = self._clock()
        await (self._cache.terminate() if target == "redis" else self._database.terminate())
        return begin

    async def _refuse_postgres(self, _: str, __: int) -> float:
        async with self._database.refusing(self._chance.choice(("role", "database"))):
            await self._pass_window()
        return self._clock()

    async def _refuse_redis(self, _: str, __: int) -> float:
        begin = self._clock()
        async with self._cache.refusing():
            await self._pass_window()
        return begin

    async def _slow(self, _: str, __: int) -> float:
        async with self._database.trigger("slow"):
            await self._pass_window()
        return self._clock()

    async def _full(self, _: str, __: int) -> float:
        async with self._database.trigger("full"):
            await self._pass_window()
        return self._clock()

    async def _value(self, _: str, __: int) -> float:
        begin = self._clock()
        async with self._database.trigger("value"):
            self.is_refusing = True
            await self._pass_window(VALUE_SECONDS)
            self.is_refusing = False
        return begin

    async def _pass_window(self, seconds: tuple[float, float] = WINDOW_SECONDS) -> None:
        await asyncio.sleep(self._chance.uniform(*seconds))

    def _goes_on_without(self, target: str) -> bool:
        """Whether runs can go on while one process of the target is away."""
        return target == "redis" or self._replicas.get(target, 1) > 1


def _suspend(pid: int) -> list[psutil.Process]:
    """Stops a process, then, as it starts no more, all that it has started."""
    parent = psutil.Process(pid)
    parent.send_signal(signal.SIGSTOP)
    family = [parent, *parent.children(recursive=True)]
    for process in family[1:]:
        _signal(process, signal.SIGSTOP)
    return family


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
