"""W6: do append, page read and start cost the same in a long run and a big database as in a short run and a small one?

Run length 10 beside 10,000; tables (sessions, runs, events) of 1,000 rows each beside 1,000,000; and the bytes that
turns 2 and 200 of one session store. One call at a time over the real wire, in slices that take turns; a ratio is the
median over pairs of slices, of the platform's CPU per call and of the median latency.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import asyncpg
import orjson
from mainspring.dev import Stack, stack
from mainspring_kit.identity import UserExecutionContext, new_id

from benchmarks import rows
from benchmarks.harness import Cpu, Report, Slice, median, pairs, parser, percentile, progress, under_test, yardstick
from benchmarks.load import LOOKUP, note_database, register
from benchmarks.wire import Log, Wire, wire

# Many short slices rather than few long ones: what is compared lies close together in time.
SECONDS_DEFAULT: Final = 0.6
REPEAT_DEFAULT: Final = 11
TABLE_SIZES: Final = (1_000, 1_000_000)
RUN_LENGTHS: Final = (10, 10_000)
# So many that a slice makes short ones not much longer, and long ones are made in reasonable time.
SHORT_LOGS: Final = 60
LONG_LOGS: Final = 20
SAMPLE: Final = 20_000
# On an uneven machine it goes on until so many pairs count, for at most so many times as long.
PAIRS_MIN: Final = 5
ROUNDS_MAX: Final = 3
WARM_UP_CALLS: Final = 30
PAGE_EVENTS: Final = 10
TURNS: Final = (2, 200)
TURN_SECONDS_MAX: Final = 10
ONE_STEP_AGENT: Final = orjson.dumps(
    {
        "apiVersion": "mainspring/v1",
        "kind": "Agent",
        "name": "one-step",
        "model": {"provider": "scripted", "script": [{"text": "Done.", "result": {}}]},
    }
)
_TURN_BYTES: Final = """
    SELECT r.ordinal, pg_column_size(r.*) + (
      SELECT sum(pg_column_size(e.*)) FROM state.events e WHERE e.tenant_id = r.tenant_id AND e.run_id = r.run_id)
    FROM state.runs r WHERE r.session_id = $1
"""

Call = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Site:
    """A stack of its own with tables of one size, and the way to it."""

    running: Stack
    wire: Wire
    database: asyncpg.Connection
    rows: rows.Rows


def main() -> int:
    """Runs the workload and prints its report."""
    options = parser("growth", __doc__ or "")
    options.set_defaults(seconds=SECONDS_DEFAULT, repeat=REPEAT_DEFAULT)
    options.add_argument(
        "--rows", type=int, nargs=2, default=TABLE_SIZES, metavar=("SMALL", "LARGE"), help="table sizes (1000 1000000)"
    )
    options.add_argument(
        "--lengths", type=int, nargs=2, default=RUN_LENGTHS, metavar=("SHORT", "LONG"), help="run lengths (10 10000)"
    )
    arguments = options.parse_args()
    report = Report.begin("growth", arguments.seed)
    # Not uvloop: it forks where asyncio uses vfork, and a process that has gRPC channels must not fork.
    asyncio.run(_measure(report, arguments))
    report.show(as_json=arguments.json)
    return 1 if report.faults else 0


async def _measure(report: Report, arguments: Namespace) -> None:
    async with AsyncExitStack() as held:
        small, large = [await _open(held, count, seed=arguments.seed) for count in arguments.rows]
        await note_database(large.running, report)
        progress("bytes per turn")
        await _measure_turns(small, report)
        comparison = Comparison(report, arguments.seconds, arguments.repeat, random.Random(arguments.seed))
        await comparison.tables((small, large), arguments.rows)
        await comparison.runs(large, arguments.lengths)


async def _open(held: AsyncExitStack, count: int, *, seed: int) -> Site:
    folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="mainspring-bench-")))
    progress(f"starting a platform and loading {count:,} rows into each table")
    running = await held.enter_async_context(stack(data_dir=folder, log_level="warning"))
    database = await asyncpg.connect(running.database_url)
    held.push_async_callback(database.close)
    loaded = await rows.load(database, count, seed=seed, sample=SAMPLE)
    await register(running, LOOKUP.read_bytes())
    await register(running, ONE_STEP_AGENT)
    return Site(running, await held.enter_async_context(wire(running)), database, loaded)


async def _measure_turns(site: Site, report: Report) -> None:
    context = _context("talker", "conversation")
    for _ in range(TURNS[1]):
        await site.wire.start(context, "lookup", wait_seconds=TURN_SECONDS_MAX)
    stored = {row[0]: float(row[1]) for row in await site.database.fetch(_TURN_BYTES, context.session_id)}
    early, late = (stored[turn] for turn in TURNS)
    report.figures |= {f"bytes_per_turn_{TURNS[0]}": early, f"bytes_per_turn_{TURNS[1]}": late}
    report.figures["bytes_ratio"] = round(late / early, 4)


class Comparison:
    """Measures the same calls at two sizes, in turns."""

    def __init__(self, report: Report, seconds: float, repeat: int, draw: random.Random) -> None:
        self._report = report
        self._seconds = seconds
        self._repeat = repeat
        self._draw = draw

    async def tables(self, sites: tuple[Site, Site], sizes: Sequence[int]) -> None:
        """Append, page read and start in the two stacks."""

        async def append(site: Site) -> Call:
            return _in_turn(site.wire.grow, await self._logs(site, RUN_LENGTHS[0]))

        async def read(site: Site) -> Call:
            return lambda: self._read_any(site)

        async def start(site: Site) -> Call:
            return lambda: self._start_any(site)

        for name, prepare in (("append", append), ("page_read", read), ("start", start)):
            await self._compare(f"{name}_table", sizes, [(site, prepare) for site in sites])

    async def runs(self, site: Site, lengths: Sequence[int]) -> None:
        """Append, page read and start with runs of the two lengths, in one stack."""
        progress(f"making {2 * LONG_LOGS} runs of {lengths[1]:,} events")
        ended = {length: await self._ended_logs(site, length) for length in lengths}
        long = await self._logs(site, lengths[1], count=LONG_LOGS)

        def append(length: int) -> Callable[[Site], Awaitable[Call]]:
            async def prepare(site: Site) -> Call:
                return _in_turn(site.wire.grow, long if length == lengths[1] else await self._logs(site, length))

            return prepare

        def read(length: int) -> Callable[[Site], Awaitable[Call]]:
            async def prepare(site: Site) -> Call:
                return _in_turn(lambda log: self._read_page(site, log, length), ended[length])

            return prepare

        def start(length: int) -> Callable[[Site], Awaitable[Call]]:
            async def prepare(site: Site) -> Call:
                return _in_turn(lambda log: site.wire.start(log.context, "one-step"), ended[length])

            return prepare

        for name, kind in (("append", append), ("page_read", read), ("start", start)):
            await self._compare(f"{name}_run", lengths, [(site, kind(length)) for length in lengths])

    async def _compare(
        self, name: str, sizes: Sequence[int], sides: Sequence[tuple[Site, Callable[[Site], Awaitable[Call]]]]
    ) -> None:
        slices: list[list[Slice]] = [[], []]
        enough = min(PAIRS_MIN, self._repeat)
        for number in range(self._repeat * ROUNDS_MAX):
            if number >= self._repeat and len(pairs(slices[1], slices[0])) >= enough:
                break
            progress(f"{name}, {sizes[0]:,} beside {sizes[1]:,}, pair {number + 1} of {self._repeat}")
            # Which of the two goes first changes, so that neither gains by it.
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                site, prepare = sides[side]
                slices[side].append(await self._slice(site, await prepare(site), f"{name} {sizes[side]}"))
        for size, found in zip(sizes, slices, strict=True):
            self._report.add("", found, prefix=f"{name}_{size}_")
        for ratio, figure in ((f"{name}_ratio", "cpu_ms"), (f"{name}_latency_ratio", "ms")):
            self._report.compare(ratio, slices[1], slices[0], figure)
            if ratio in self._report.ratios:
                self._report.figures[ratio] = self._report.ratios[ratio]["median"]

    async def _slice(self, site: Site, call: Call, name: str) -> Slice:
        for _ in range(WARM_UP_CALLS):
            await call()
        speed = yardstick()
        durations = []
        cpu = Cpu(site.running.pids)
        end = time.perf_counter() + self._seconds
        while (begin := time.perf_counter()) < end:
            await call()
            durations.append(time.perf_counter() - begin)
        used = cpu.used()
        total = self._report.cpu_seconds.setdefault(name, dict.fromkeys(used, 0.0))
        self._report.cpu_seconds[name] = {process: round(total[process] + used[process], 3) for process in used}
        speed = min(speed, yardstick())
        figures = {
            "ms": median(durations) * 1e3,
            "p99_ms": percentile(durations, 0.99) * 1e3,
            "cpu_ms": under_test(used) / len(durations) * 1e3,
        }
        return Slice(figures, speed)

    async def _logs(self, site: Site, length: int, *, count: int = SHORT_LOGS) -> list[Log]:
        """Fresh runs of this length in some of the sessions there are."""
        some = self._draw.sample(site.rows.sessions, count)
        logs = [await site.wire.create(_context(row.user_id, row.session_id)) for row in some]
        async with asyncio.TaskGroup() as tasks:
            for log in logs:
                tasks.create_task(site.wire.grow_to(log, length))
        return logs

    async def _ended_logs(self, site: Site, length: int) -> list[Log]:
        logs = await self._logs(site, length - 1, count=LONG_LOGS)
        for log in logs:
            await site.wire.end(log)
        return logs

    async def _read_any(self, site: Site) -> None:
        row = self._draw.choice(site.rows.logs)
        context = _context(row.user_id, row.session_id)
        await site.wire.read_page(context, row.run_id, after_seq=0, size=PAGE_EVENTS)

    async def _read_page(self, site: Site, log: Log, length: int) -> None:
        after_seq = self._draw.randrange(length - PAGE_EVENTS + 1)
        await site.wire.read_page(log.context, log.run_id, after_seq=after_seq, size=PAGE_EVENTS)

    async def _start_any(self, site: Site) -> None:
        row = self._draw.choice(site.rows.sessions)
        await site.wire.start(_context(row.user_id, row.session_id), "one-step")


def _in_turn(call: Callable[[Log], Awaitable[object]], logs: Sequence[Log]) -> Call:
    """Makes the call with one log after the other, round and round."""
    turns = itertools.cycle(logs)
    return lambda: call(next(turns))


def _context(user_id: str, session_id: str) -> UserExecutionContext:
    return UserExecutionContext(rows.TENANT, user_id, session_id=session_id, request_id=new_id(), roles=("runner",))


if __name__ == "__main__":
    sys.exit(main())
