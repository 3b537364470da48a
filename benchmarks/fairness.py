"""Fairness: a quiet tenant's runs, alone and beside a noisy tenant that keeps thousands of runs in line.

One executor drives few runs at a time, and each run takes a fixed while. The quiet tenant starts its runs one after the
other on a few sockets; the noisy one starts so many that at least `--queued` of its runs stand QUEUED all the time.
Slices with and without it take turns. What fair lines should give: a quiet run waits for the next free place, not for
the noisy line.
"""

from __future__ import annotations

import asyncio
import math
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import asyncpg
import grpc
import orjson
from mainspring.dev import Stack, stack
from mainspring.v1 import execution_pb2, execution_pb2_grpc
from mainspring_kit.channel import Peer
from mainspring_kit.identity import ServiceTokens, UserExecutionContext, new_id

from benchmarks.harness import Report, Slice, carry_out, keep, parser, progress
from benchmarks.load import Load, note_database
from benchmarks.sockets import RunLoop, connect

QUIET, NOISY = "quiet-tenant", "noisy-tenant"
QUEUED_DEFAULT: Final = 2_000
# What the executor drives at a time, and how long a run takes without any other: so there is a line, and a rate.
RUNS_MAX: Final = 32
STEP_SECONDS: Final = 0.1
QUIET_SOCKETS: Final = 2
LEAD_SECONDS: Final = 0.5
TOP_UP_SECONDS: Final = 0.05
FRAME_STARTS_MAX: Final = 256
COUNTS_MAX: Final = 4_000
EVENTS: Final = 3
START: Final = {"op": "start", "id": "1", "agent": "brief", "input": {}}
AGENT: Final = orjson.dumps(
    {
        "apiVersion": "mainspring/v1",
        "kind": "Agent",
        "name": "brief",
        "model": {
            "provider": "scripted",
            "script": [{"text": "Done.", "delay": f"{STEP_SECONDS * 1e3:g}ms", "result": {}}],
        },
    }
)
_QUEUED: Final = "SELECT coalesce(sum(queued), 0) FROM state.shares WHERE tenant_id = $1"
_ENDED: Final = "SELECT count(*) FROM state.runs WHERE tenant_id = $1 AND state >= 5"


@dataclass(slots=True)
class Crowd:
    """The noisy tenant: keeps so many runs QUEUED. `least`: the fewest that were so since the slice began."""

    running: Stack
    database: asyncpg.Pool
    queued: int
    least: int = 0
    faults: list[str] = field(default_factory=list)

    async def keep_up(self) -> None:
        """Starts runs as long as it is awaited."""
        tokens = ServiceTokens(self.running.service_secret, "benchmark")
        async with Peer(self.running.services["execution"], tokens) as peer:
            call = execution_pb2_grpc.ExecutionServiceStub(peer.channel).StartRuns(**peer.stream())
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(call))
                while True:
                    missing = self.queued + FRAME_STARTS_MAX - await self.count()
                    if missing > 0:
                        await call.write(_starts(min(missing, FRAME_STARTS_MAX)))
                    await asyncio.sleep(TOP_UP_SECONDS)

    async def count(self) -> int:
        """How many of its runs are QUEUED now."""
        count = int(await self.database.fetchval(_QUEUED, NOISY))
        self.least = min(self.least, count)
        return count

    async def until(self, least: int, most: float) -> None:
        """Returns when so many are QUEUED."""
        for _ in range(COUNTS_MAX):
            if least <= await self.count() <= most:
                return
            await asyncio.sleep(TOP_UP_SECONDS)
        raise RuntimeError(f"after {COUNTS_MAX} looks there are not {least:g} to {most:g} runs in line")

    async def _read(self, call: Any) -> None:
        """Any: grpc.aio's calls are generic over messages that the stubs do not name."""
        while (response := await call.read()) is not grpc.aio.EOF:
            self.faults += [result.status.message for result in response.results if result.status.code]


def main() -> int:
    """Runs the workload and prints its report."""
    options = parser("fairness", __doc__ or "")
    options.add_argument(
        "--queued", type=int, default=QUEUED_DEFAULT, help="runs of the noisy tenant in line (default %(default)s)"
    )
    return carry_out("fairness", _measure, options.parse_args())


async def _measure(report: Report, arguments: Namespace) -> None:
    async with AsyncExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="mainspring-bench-")))
        progress("starting the platform")
        running = await held.enter_async_context(
            stack(data_dir=folder, log_level="warning", extra_env={"MAINSPRING_RUNS_MAX": str(RUNS_MAX)})
        )
        await note_database(running, report)
        for tenant in (QUIET, NOISY):
            await _register(running, tenant)
        database = await held.enter_async_context(asyncpg.create_pool(running.database_url, min_size=1, max_size=2))
        url = running.gateway.replace("http://", "ws://") + "/v1/stream"
        loops = [
            await connect(url, running.mint(user=f"user-{number}", tenant=QUIET), START, EVENTS)
            for number in range(QUIET_SOCKETS)
        ]
        crowd = Crowd(running, database, arguments.queued)
        alone: list[Slice] = []
        beside: list[Slice] = []
        for number in range(arguments.repeat):
            progress(f"round {number + 1} of {arguments.repeat}")
            load = Load(running, loops, report, kind="alone, ", lead_seconds=LEAD_SECONDS)
            alone.append(await load.measure(QUIET_SOCKETS, arguments.seconds))
            beside.append(await _beside(crowd, loops, report, arguments.seconds))
        report.add("alone", [_quiet(piece) for piece in alone])
        report.add("beside", [_quiet(piece) for piece in beside])
        for figure in ("quiet_p50_ms", "quiet_p99_ms"):
            report.compare(figure, [_quiet(piece) for piece in beside], [_quiet(piece) for piece in alone], figure)
        report.faults += crowd.faults[:10]
        if sum(keep(beside)) < 1:
            report.notes.append("the machine was too uneven: no slice counts")
        for loop in loops:
            loop.close()


async def _beside(crowd: Crowd, loops: Sequence[RunLoop], report: Report, seconds: float) -> Slice:
    """A slice with the noisy tenant, and what that one got through; its line is empty again at the end."""
    async with asyncio.TaskGroup() as tasks:
        filling = tasks.create_task(crowd.keep_up())
        await crowd.until(crowd.queued, math.inf)
        crowd.least = crowd.queued
        before, began = await crowd.database.fetchval(_ENDED, NOISY), time.perf_counter()
        load = Load(crowd.running, loops, report, kind="beside, ", lead_seconds=LEAD_SECONDS)
        piece = await load.measure(len(loops), seconds)
        ended = await crowd.database.fetchval(_ENDED, NOISY) - before
        rate = ended / (time.perf_counter() - began)
        least = crowd.least
        filling.cancel()
    await crowd.until(0, 0)
    return Slice({**piece.figures, "noisy_runs_per_second": rate, "noisy_queued_least": least}, piece.speed)


def _quiet(piece: Slice) -> Slice:
    """The figures of a slice that this workload shows."""
    names = {"runs_per_second": "quiet_runs_per_second", "p50_ms": "quiet_p50_ms", "p99_ms": "quiet_p99_ms"}
    figures = {names.get(name, name): value for name, value in piece.figures.items() if not name.startswith("cpu")}
    return Slice(figures, piece.speed)


def _starts(count: int) -> execution_pb2.StartRunsRequest:
    start = execution_pb2.StartRunRequest(agent="brief")
    items = []
    for number in range(count):
        context = UserExecutionContext(
            tenant_id=NOISY, user_id=f"user-{number % 16}", run_id=new_id(), request_id=new_id(), roles=("runner",)
        )
        items.append(execution_pb2.StartItem(item_id=number + 1, context=context.to_message(), start=start))
    return execution_pb2.StartRunsRequest(starts=items)


async def _register(running: Stack, tenant: str) -> None:
    token = running.mint(user="operator", tenant=tenant)
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/yaml"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{running.gateway}/v1/agents", data=AGENT) as answer,
    ):
        if answer.status >= 300:
            raise RuntimeError(f"the agent was not registered: {await answer.text()}")


if __name__ == "__main__":
    sys.exit(main())
