"""The load of the drill: users on sockets, and starts that come when they come, whether others have ended or not."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from mainspring.dev import Stack

from benchmarks.faults.client import Client, Ledger
from benchmarks.faults.runs import Mix, Run
from benchmarks.harness import Report
from benchmarks.load import LOOKUP, LOOKUP_EVENTS, LOOKUP_START, connect_users, drive, register

USERS: Final = 64
OPEN_RUNS_MAX: Final = 40
TICK_SECONDS: Final = 0.005
PEAK_SECONDS: Final = 4.0
WARM_UP_SECONDS: Final = 2.0
# The longest wait for what a fault has queued, so that its delay is not the next fault's too.
SETTLE_SECONDS_MAX: Final = 10.0


async def measure_peak(stack: Stack) -> float:
    """W1 on this stack: look-up runs a second of 64 sockets, back to back."""
    await register(stack, LOOKUP.read_bytes())
    loops = await connect_users(stack, USERS, start=LOOKUP_START, events=LOOKUP_EVENTS)
    await drive(stack, loops, WARM_UP_SECONDS)
    tally, _, elapsed = await drive(stack, loops, PEAK_SECONDS)
    return len(tally.durations) / elapsed


class Load:
    """Starts runs at a rate while `run` is awaited; `skipped` counts those whose user had too many open."""

    def __init__(self, stack: Stack, *, rate: float, seed: int, effects: Path, is_marking: Callable[[], bool]) -> None:
        """`effects`: the folder whose files the keyed calls write; `is_marking`: whether marked runs may be started."""
        self.ledger = Ledger()
        self.runs: list[Run] = []
        self.skipped = 0
        self._rate = rate
        self._chance = random.Random(f"load {seed}")
        self._mix = Mix(self._chance)
        self._effects = effects
        self._is_marking = is_marking
        self._changed = asyncio.Event()
        urls = [url.replace("http://", "ws://") + "/v1/stream" for url in stack.gateways]
        self.clients = [self._client(stack, f"drill-{number}", urls) for number in range(USERS)]

    @property
    def open_runs(self) -> int:
        """How many runs have been asked for and have not ended."""
        return sum(len(client.open) for client in self.clients)

    async def settle(self) -> None:
        """Until no more runs are open than are started in a second (undisturbed: half of that), or for so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_SECONDS_MAX):
                while self.open_runs > self._rate:
                    self._changed.clear()
                    await self._changed.wait()

    async def connect(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """Lets all clients connect; their tasks go on until cancelled."""
        return [tasks.create_task(client.stay()) for client in self.clients]

    async def run(self) -> None:
        """Starts runs as they fall due."""
        clock = asyncio.get_running_loop().time
        due = clock()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = clock()
            while due <= now:
                self._start_one()
                due += self._chance.expovariate(self._rate)

    async def wait_ended(self, seconds: float) -> None:
        """Until every run has ended; TimeoutError after so many seconds."""
        async with asyncio.timeout(seconds):
            while self.open_runs:
                self._changed.clear()
                await self._changed.wait()

    def _start_one(self) -> None:
        client = self._chance.choice(self.clients)
        if len(client.open) >= OPEN_RUNS_MAX:
            self.skipped += 1
            return
        run = self._mix.draw(client.user, str(self._effects / client.user), marked=self._is_marking())
        self.runs.append(run)
        client.start(run)

    def _client(self, stack: Stack, user: str, urls: list[str]) -> Client:
        chance = random.Random(self._chance.random())
        token = stack.mint(user=user, roles=("runner",))
        return Client(user, token, urls=urls, chance=chance, ledger=self.ledger, ended=self._changed.set)


def add_load(report: Report, load: Load) -> None:
    """What the load adds to the figures."""
    report.figures["skipped"] = load.skipped
    waits = sorted(run.acknowledged_time - run.asked_time for run in load.runs if run.acknowledged_time)
    if waits:
        report.figures["start_p50_s"] = round(waits[len(waits) // 2], 3)
        report.figures["start_p99_s"] = round(waits[int(len(waits) * 0.99)], 3)
