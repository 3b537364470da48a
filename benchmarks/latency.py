"""W2: at half of W1's peak, starts at an even pace over 64 sockets, however long the runs take.

Start to first event: from the frame sent to `agent_started` received. Commit to frame: from the time that PostgreSQL
gives the row's commit (track_commit_timestamp; taken before the log is flushed, so that the flush is in the figure) to
the frame at the client. Step overhead: one run in eight calls a tool that reads the clock, twice; from the end of the
first call to the beginning of the second: two changes of step, the model step between them takes no time itself.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import asyncpg
import orjson
from mainspring.dev import Stack, stack

from benchmarks.harness import (
    Cpu,
    Report,
    Slice,
    carry_out,
    median,
    parser,
    percentile,
    progress,
    repeated,
    under_test,
    yardstick,
)
from benchmarks.load import LOOKUP, LOOKUP_EVENTS, LOOKUP_START, Load, connect_users, drive, note_database, register
from benchmarks.paced import PacedSocket, Record, connect_paced, pace

SOCKETS: Final = 64
# Of so many runs, one measures the overhead of steps.
CLOCK_SHARE: Final = 8
CLOCK_EVENTS: Final = 9
PEAK_SLICES: Final = 3
PEAK_SECONDS_MAX: Final = 3.0
WARM_UP_SECONDS: Final = 2.0
END_SECONDS_MAX: Final = 30.0
_CLOCK_STEP: Final = {"text": "What time is it?", "calls": [{"tool": "benchmark.clock"}]}
CLOCK_AGENT: Final = orjson.dumps(
    {
        "apiVersion": "mainspring/v1",
        "kind": "Agent",
        "name": "clock",
        "model": {
            "provider": "scripted",
            "script": [_CLOCK_STEP, _CLOCK_STEP, {"text": "Done.", "result": {}}],
        },
        "tools": ["benchmark.clock"],
        "limits": {"timeout": "30s", "max_steps": 3},
    }
)
_COMMIT_TIMES: Final = """
    SELECT run_id::text, seq, extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8
    FROM state.events WHERE event_time >= to_timestamp($1)
"""


def main() -> int:
    """Runs the workload and prints its report; exit code 1 when one was not whole or came before its commit."""
    options = parser("latency", __doc__ or "")
    options.add_argument(
        "--rate", type=float, default=0.0, help="starts a second (default: half of the peak, measured)"
    )
    return carry_out("latency", _measure, options.parse_args())


async def _measure(report: Report, arguments: Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="mainspring-bench-") as folder:
        progress("starting the platform")
        async with stack(data_dir=Path(folder), workers=["benchmarks.tools"], log_level="warning") as running:
            database = await _track_commits(running)
            try:
                await note_database(running, report)
                await register(running, LOOKUP.read_bytes())
                await register(running, CLOCK_AGENT)
                rate = arguments.rate or await _half_of_peak(running, arguments.seconds, report)
                sockets = [
                    await connect_paced(running.gateway, running.mint(user=f"user-{number}"))
                    for number in range(SOCKETS)
                ]
                measure = partial(_slice, running, database, sockets, rate, arguments.seconds, report)
                title = f"{rate:.0f} starts a second"
                report.add("", await repeated(measure, arguments.repeat, title=title))
            finally:
                await database.close()


async def _track_commits(running: Stack) -> asyncpg.Connection:
    """Has PostgreSQL keep the times of commits, which takes a restart."""
    database = await asyncpg.connect(running.database_url)
    await database.execute("ALTER SYSTEM SET track_commit_timestamp = on")
    await database.close()
    await running.restart("postgres")
    await running.wait_ready()
    return await asyncpg.connect(running.database_url)


async def _half_of_peak(running: Stack, seconds: float, report: Report) -> float:
    progress("measuring the peak")
    peak = Report("peak", report.seed)
    loops = await connect_users(running, SOCKETS, start=LOOKUP_START, events=LOOKUP_EVENTS)
    await drive(running, loops, WARM_UP_SECONDS)
    load = Load(running, loops, peak)
    slices = [await load.measure(SOCKETS, min(seconds, PEAK_SECONDS_MAX)) for _ in range(PEAK_SLICES)]
    for loop in loops:
        loop.close()
    report.faults += peak.faults
    return median(piece.figures["runs_per_second"] for piece in slices) / 2


async def _slice(
    running: Stack,
    database: asyncpg.Connection,
    sockets: Sequence[PacedSocket],
    rate: float,
    seconds: float,
    report: Report,
) -> Slice:
    speed = yardstick()
    record = Record({"lookup": LOOKUP_EVENTS, "clock": CLOCK_EVENTS})
    cpu = Cpu(running.pids)
    starts = [
        {**LOOKUP_START, "agent": "clock" if number % CLOCK_SHARE == 0 else "lookup"}
        for number in range(int(rate * seconds))
    ]
    begin = await pace(sockets, record, starts, rate=rate)
    try:
        async with asyncio.timeout(END_SECONDS_MAX):
            await record.wait_ended(len(starts))
    except TimeoutError:
        report.faults.append(f"{len(starts) - record.ended} runs had not ended after {END_SECONDS_MAX:g} s")
    used = cpu.used()
    report.cpu_seconds[f"{rate:.0f} starts a second, slice {len(report.cpu_seconds) + 1}"] = used
    speed = min(speed, yardstick())
    rows = await database.fetch(_COMMIT_TIMES, begin)
    frames = [
        record.arrivals[run_id][seq - 1] - committed
        for run_id, seq, committed in rows
        if run_id in record.arrivals and seq <= len(record.arrivals[run_id])
    ]
    report.faults += record.faults
    if any(delay < 0 for delay in frames):
        report.faults.append("a frame came before its commit")
    firsts = record.first_events()
    figures = {
        **_percentiles("start_to_first_event", firsts),
        **_percentiles("commit_to_frame", frames),
        **_percentiles("step_overhead", record.gaps),
        **_percentiles("pacing_late", record.lateness),
        "rate": rate,
        "cpu_ms_per_run": under_test(used) / max(1, len(starts)) * 1e3,
        "yardstick": speed,
    }
    return Slice(figures, speed)


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    return {f"{name}_p50_ms": percentile(seconds, 0.5) * 1e3, f"{name}_p99_ms": percentile(seconds, 0.99) * 1e3}


if __name__ == "__main__":
    sys.exit(main())
