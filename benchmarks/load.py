"""The load of whole runs: an agent registered, sockets that start it back to back, a slice of that measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
from mainspring.dev import Stack

from benchmarks.harness import Cpu, Report, Slice, percentile, under_test, yardstick
from benchmarks.sockets import RunLoop, Tally, connect

LOOKUP = Path(__file__).resolve().parents[1] / "examples" / "lookup" / "agent.yaml"
LOOKUP_START = {"op": "start", "id": "1", "agent": "lookup", "input": {"value": "forty-two"}}
# Started, thinking, executing, completed, thinking, completed: each model step is an event of its own.
LOOKUP_EVENTS = 6
LEAD_SECONDS = 0.25
END_SECONDS_MAX = 60.0


async def register(running: Stack, spec: bytes) -> None:
    """Registers an agent's specification."""
    headers = {"Authorization": f"Bearer {running.token}", "Content-Type": "application/yaml"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{running.gateway}/v1/agents", data=spec) as answer,
    ):
        if answer.status >= 300:
            raise RuntimeError(f"the agent was not registered: {await answer.text()}")


async def note_database(running: Stack, report: Report) -> None:
    """Puts the server's version into the report, and a fault where it does not make commits durable."""
    database = await asyncpg.connect(running.database_url)
    try:
        report.versions["postgresql"] = await database.fetchval("SHOW server_version")
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            if await database.fetchval(f"SHOW {setting}") != "on":
                report.faults.append(f"PostgreSQL runs with {setting} off: its commits are not durable")
    finally:
        await database.close()


async def connect_users(running: Stack, count: int, *, start: Mapping[str, Any], events: int) -> list[RunLoop]:
    """So many sockets, each of a user of its own, for runs of so many events. Any: JSON."""
    url = running.gateway.replace("http://", "ws://") + "/v1/stream"
    return [await connect(url, running.mint(user=f"user-{number}"), start, events) for number in range(count)]


class Load:
    """The platform under back-to-back runs of one agent: a `Subject`."""

    name = "mainspring"

    def __init__(
        self,
        running: Stack,
        loops: Sequence[RunLoop],
        report: Report,
        *,
        kind: str = "",
        lead_seconds: float = LEAD_SECONDS,
    ) -> None:
        self._kind = kind
        self._lead_seconds = lead_seconds
        self._running = running
        self._loops = loops
        self._report = report
        self._slices = 0

    async def measure(self, callers: int, seconds: float) -> Slice:
        """A slice with so many sockets. CPU seconds and faults go to the report."""
        self._slices += 1
        speed = yardstick()
        loops = self._loops[:callers]
        tally, used, elapsed = await drive(self._running, loops, seconds, lead_seconds=self._lead_seconds)
        self._report.cpu_seconds[f"{self._kind}{callers} sockets, slice {self._slices}"] = used
        self._report.faults += tally.faults
        runs = max(1, len(tally.durations))
        figures = {
            "runs_per_second": len(tally.durations) / elapsed,
            "p50_ms": percentile(tally.durations, 0.5) * 1e3,
            "p99_ms": percentile(tally.durations, 0.99) * 1e3,
            "first_event_p50_ms": percentile(tally.first_events, 0.5) * 1e3,
            "cpu_ms_per_run": under_test(used) / runs * 1e3,
        }
        figures |= {
            f"cpu_ms_per_run_{process.replace(' ', '_')}": value / runs * 1e3 for process, value in used.items()
        }
        speed = min(speed, yardstick())
        return Slice(figures | {"yardstick": speed}, speed)


async def drive(
    running: Stack, loops: Sequence[RunLoop], seconds: float, *, lead_seconds: float = LEAD_SECONDS
) -> tuple[Tally, dict[str, float], float]:
    """Lets these sockets run back to back: what they saw, CPU seconds per process, and how long it was.

    Counting begins when the runs are under way: the first ones begin all at once, and none of them ends soon.
    """
    lead, tally = Tally(), Tally()
    for loop in loops:
        loop.begin(lead)
    await asyncio.sleep(lead_seconds)
    cpu = Cpu(running.pids)
    start = time.perf_counter()
    for loop in loops:
        loop.begin(tally)
    while True:
        await asyncio.sleep(seconds)
        # On a slow machine no run of a short slice may have ended yet: then it is longer.
        if tally.durations or time.perf_counter() > start + END_SECONDS_MAX:
            break
    elapsed, used = time.perf_counter() - start, cpu.used()
    durations, first_events = list(tally.durations), list(tally.first_events)
    for loop in loops:
        loop.end()
    try:
        async with asyncio.timeout(END_SECONDS_MAX):
            for loop in loops:
                await loop.idle.wait()
    except TimeoutError:
        late = sum(not loop.idle.is_set() for loop in loops)
        tally.faults.append(f"{late} runs had not ended after {END_SECONDS_MAX:g} s")
    return Tally(durations, first_events, lead.faults + tally.faults), used, elapsed
