"""W8, waiting: runs that sleep until a time of their own. What they cost executors, and how late each wakes.

Many runs are started that all sleep (`run.sleep`), each until a moment of its own, spread evenly over `--seconds`; the
first moment comes when all of them wait. Memory of the executors is read before the first start and when all runs wait:
then no executor holds a lease, a task or anything else of them. The lateness of a run is the time from its moment to
the commit of the sleep's end, as its log says.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import asyncpg
import grpc
import orjson
from mainspring.dev import Stack, stack
from mainspring.v1 import execution_pb2, execution_pb2_grpc
from mainspring_kit.channel import Peer
from mainspring_kit.identity import ServiceTokens, UserExecutionContext, new_id
from mainspring_kit.tasks import background

from benchmarks.harness import Cpu, Report, carry_out, memory, parser, percentile, progress, under_test
from benchmarks.load import note_database, register

TENANT: Final = "dev"
RUNS_DEFAULT: Final = 100_000
SECONDS_DEFAULT: Final = 600.0
USERS: Final = 1_000
WARM_UP_RUNS: Final = 500
# At least so many starts a second are expected; runs that wake before all wait are counted, but say so.
STARTS_PER_SECOND: Final = 250
FRAME_STARTS_MAX: Final = 128
UNANSWERED_MAX: Final = 1_024
POLL_SECONDS: Final = 0.25
# How long after the last moment every run must have ended.
END_SECONDS_MAX: Final = 120.0
AGENT: Final = orjson.dumps(
    {
        "apiVersion": "mainspring/v1",
        "kind": "Agent",
        "name": "sleeper",
        "model": {
            "provider": "scripted",
            "script": [
                {"text": "I sleep.", "calls": [{"tool": "run.sleep", "arguments": {"until": "{{input.until}}"}}]},
                {"text": "Done.", "result": {}},
            ],
        },
        "tools": ["run.sleep"],
        "limits": {"timeout": "24h", "max_steps": 2},
    }
)
_STATES: Final = "SELECT state, count(*) FROM state.runs WHERE tenant_id = $1 GROUP BY state"
_LEASES: Final = "SELECT count(*) FROM state.leases WHERE tenant_id = $1"
_LATENESS: Final = """
    SELECT extract(epoch FROM e.event_time - (convert_from(r.input, 'UTF8')::jsonb ->> 'until')::timestamptz)::float8
    FROM state.runs r JOIN state.events e ON e.tenant_id = r.tenant_id AND e.run_id = r.run_id
    WHERE r.tenant_id = $1 AND e.type = 'tool_completed' AND r.state = 5
"""
WAITING, COMPLETED = 3, 5


class Starter:
    """Starts runs over one stream, a bounded number of them unanswered at a time."""

    def __init__(self, call: Any, report: Report) -> None:
        """Any: grpc.aio's calls are generic over messages that the stubs do not name."""
        self._call = call
        self._report = report
        self._room = asyncio.Semaphore(UNANSWERED_MAX)

    async def read(self) -> None:
        """Takes in answers, as long as it is awaited."""
        while (response := await self._call.read()) is not grpc.aio.EOF:
            for result in response.results:
                if result.status.code:
                    self._report.faults.append(result.status.message)
                self._room.release()

    async def start(self, moments: Sequence[float]) -> None:
        """Starts a run that sleeps until each of these moments; returns when each has an answer."""
        for first in range(0, len(moments), FRAME_STARTS_MAX):
            frame = execution_pb2.StartRunsRequest()
            for number, moment in enumerate(moments[first : first + FRAME_STARTS_MAX], first):
                await self._room.acquire()
                until = datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")
                context = UserExecutionContext(
                    tenant_id=TENANT,
                    user_id=f"user-{number % USERS}",
                    run_id=new_id(),
                    request_id=new_id(),
                    roles=("runner",),
                )
                start = execution_pb2.StartRunRequest(agent="sleeper", input=orjson.dumps({"until": until}))
                frame.starts.add(item_id=number + 1, context=context.to_message(), start=start)
            await self._call.write(frame)
        for _ in range(UNANSWERED_MAX):
            await self._room.acquire()
        for _ in range(UNANSWERED_MAX):
            self._room.release()


def main() -> int:
    """Runs the workload and prints its report; exit code 1 when a run was lost, or an executor held one that waits."""
    options = parser("waiting", __doc__ or "")
    options.set_defaults(seconds=SECONDS_DEFAULT)
    options.add_argument("--runs", type=int, default=RUNS_DEFAULT, help="runs that wait (default %(default)s)")
    return carry_out("waiting", _measure, options.parse_args())


async def _measure(report: Report, arguments: Namespace) -> None:
    async with AsyncExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="mainspring-bench-")))
        progress("starting the platform")
        running = await held.enter_async_context(stack(data_dir=folder, log_level="warning"))
        await note_database(running, report)
        await register(running, AGENT)
        database = await asyncpg.connect(running.database_url)
        held.push_async_callback(database.close)
        peer = await held.enter_async_context(
            Peer(running.services["execution"], ServiceTokens(running.service_secret, "benchmark"))
        )
        call = execution_pb2_grpc.ExecutionServiceStub(peer.channel).StartRuns(**peer.stream())
        starter = Starter(call, report)
        async with background(starter.read()):
            await starter.start([time.time()] * WARM_UP_RUNS)
            await _until(database, COMPLETED, WARM_UP_RUNS, seconds=END_SECONDS_MAX)
            await database.execute("DELETE FROM state.events WHERE tenant_id = $1", TENANT)
            before = memory(running.pids)["execution"]
            await _sleep_and_wake(running, database, starter, report=report, arguments=arguments, before=before)
            call.cancel()


async def _sleep_and_wake(
    running: Stack,
    database: asyncpg.Connection,
    starter: Starter,
    *,
    report: Report,
    arguments: Namespace,
    before: dict[str, float],
) -> None:
    count, seconds = arguments.runs, arguments.seconds
    begin = time.time() + 5.0 + count / STARTS_PER_SECOND
    progress(f"starting {count:,} runs that wake from {begin - time.time():.0f} s from now on, for {seconds:g} s")
    started = time.perf_counter()
    await starter.start([begin + seconds * number / count for number in range(count)])
    await _until(database, WAITING, count, seconds=max(1.0, begin - time.time()))
    took = time.perf_counter() - started
    after = memory(running.pids)["execution"]
    leases = await database.fetchval(_LEASES, TENANT)
    if time.time() > begin:
        report.notes.append("some runs woke before all waited: the machine is too slow for so many starts a second")
    elif leases:
        report.faults.append(f"executors hold {leases} of the runs that wait")
    progress(f"{count:,} runs wait; they wake")
    cpu = Cpu(running.pids)
    await _until(database, COMPLETED, WARM_UP_RUNS + count, seconds=begin + seconds - time.time() + END_SECONDS_MAX)
    used = cpu.used()
    report.cpu_seconds["while they wake"] = used
    lateness = [row[0] for row in await database.fetch(_LATENESS, TENANT)]
    states = {row[0]: row[1] for row in await database.fetch(_STATES, TENANT)}
    if len(lateness) != count or states != {COMPLETED: WARM_UP_RUNS + count}:
        report.faults.append(f"of {count} runs {len(lateness)} woke; the states are {states}")
    report.figures |= {
        "waiting_runs": count,
        "starts_per_second": count / took,
        "executors_mib_before": before["rss"],
        "executors_mib_waiting": after["rss"],
        "executors_bytes_per_waiting_run": max(0.0, after["rss"] - before["rss"]) * 2**20 / count,
        "late_p50_ms": percentile(lateness, 0.5) * 1e3,
        "late_p99_ms": percentile(lateness, 0.99) * 1e3,
        "late_max_ms": max(lateness, default=float("nan")) * 1e3,
        "early_max_ms": max(0.0, -min(lateness, default=0.0)) * 1e3,
        "cpu_ms_per_wake": under_test(used) / count * 1e3,
    }


async def _until(database: asyncpg.Connection, state: int, count: int, *, seconds: float) -> None:
    """Returns when so many runs are in this state, or the time is over."""
    for _ in range(max(1, int(seconds / POLL_SECONDS))):
        if {row[0]: row[1] for row in await database.fetch(_STATES, TENANT)}.get(state, 0) >= count:
            return
        await asyncio.sleep(POLL_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
