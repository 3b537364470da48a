"""W1: N sockets, each back to back, from `start` to `agent_completed` of the scripted look-up run.

Two model steps, one pure tool, six events of five kinds, all durable, all delivered. A run counts only if its log came
whole. With --peers the same work by others, interleaved in one run. Then W1b, heavier runs: 20 steps, each with a tool
result of 8 KiB.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Final

import asyncpg
import orjson
from mainspring.dev import Stack, stack

from benchmarks.harness import Report, carry_out, parser, progress, repeated
from benchmarks.interleave import CALLERS, measure_beside_peers
from benchmarks.load import LOOKUP, LOOKUP_EVENTS, LOOKUP_START, Load, connect_users, drive, note_database, register

WARM_UP_SECONDS: Final = 2.0
WARM_UP_SOCKETS: Final = 16
HEAVY_SOCKETS: Final = 64
HEAVY_LEAD_SECONDS: Final = 1.0
HEAVY_STEPS: Final = 20
HEAVY_RESULT_BYTES: Final = 8 << 10
# Started, each step's thinking, executing and completed, the last thinking, completed.
HEAVY_EVENTS: Final = 1 + 3 * HEAVY_STEPS + 2
HEAVY_START: Final = {"op": "start", "id": "1", "agent": "heavy"}
HEAVY_DELTAS: Final = 200
HEAVY_NOTE: Final = (
    f"W1b streams {HEAVY_DELTAS} deltas a step, which the sockets read. heavy_stored_ratio is what all tables of the "
    "schema state grew by, indexes and TOAST included, by the bytes of the tools' results alone"
)
_STEP: Final = {
    "text": "ab" * HEAVY_DELTAS,
    "deltas": HEAVY_DELTAS,
    "calls": [{"tool": "benchmark.payload", "arguments": {"size": HEAVY_RESULT_BYTES}}],
}
HEAVY_AGENT: Final = orjson.dumps(
    {
        "apiVersion": "mainspring/v1",
        "kind": "Agent",
        "name": "heavy",
        "model": {
            "provider": "scripted",
            "script": [*[_STEP] * HEAVY_STEPS, {"text": "Done.", "result": {"steps": HEAVY_STEPS}}],
        },
        "tools": ["benchmark.payload"],
        "limits": {"timeout": "120s", "max_steps": HEAVY_STEPS + 1},
    }
)
_STORED_BYTES: Final = """
    SELECT sum(pg_total_relation_size(c.oid))::bigint FROM pg_class c
    WHERE c.relnamespace = 'state'::regnamespace AND c.relkind = 'r'
"""


def main() -> int:
    """Runs the workload and prints its report; exit code 1 when a run was not whole."""
    options = parser("throughput", __doc__ or "")
    options.add_argument("--sockets", type=int, nargs="+", default=[1, 64, 256], help="how many (default 1 64 256)")
    options.add_argument("--replicas", default="", help="as of `mainspring dev`, e.g. execution=2")
    options.add_argument("--no-heavy", action="store_true", help="leave W1b out")
    return carry_out("throughput", _measure, options.parse_args())


async def _measure(report: Report, arguments: Namespace) -> None:
    parts = (part.partition("=") for part in arguments.replicas.split(",") if part)
    counts = {name: int(count) for name, _, count in parts}
    with tempfile.TemporaryDirectory(prefix="mainspring-bench-") as folder:
        progress("starting the platform")
        async with stack(
            data_dir=Path(folder), replicas=counts, workers=["benchmarks.tools"], log_level="warning"
        ) as running:
            await register(running, LOOKUP.read_bytes())
            await note_database(running, report)
            most = max([*arguments.sockets, *(CALLERS if arguments.peers else ())])
            loops = await connect_users(running, most, start=LOOKUP_START, events=LOOKUP_EVENTS)
            await drive(running, loops[:WARM_UP_SOCKETS], WARM_UP_SECONDS)
            load = Load(running, loops, report)
            for callers in arguments.sockets:
                measure = partial(load.measure, callers, arguments.seconds)
                report.add(str(callers), await repeated(measure, arguments.repeat, title=f"{callers} sockets"))
            if arguments.peers:
                await measure_beside_peers(running, load, report, seconds=arguments.seconds, repeat=arguments.repeat)
            if not arguments.no_heavy:
                await _measure_heavy(running, arguments.seconds, arguments.repeat, report)


async def _measure_heavy(running: Stack, seconds: float, repeat: int, report: Report) -> None:
    await register(running, HEAVY_AGENT)
    loops = await connect_users(running, HEAVY_SOCKETS, start=HEAVY_START, events=HEAVY_EVENTS)
    database = await asyncpg.connect(running.database_url)
    try:
        before = await database.fetchval(_STORED_BYTES)
        load = Load(running, loops, report, kind="heavy ", lead_seconds=HEAVY_LEAD_SECONDS)
        measure = partial(load.measure, HEAVY_SOCKETS, seconds)
        slices = await repeated(measure, repeat, title=f"W1b, {HEAVY_SOCKETS} sockets")
        stored = await database.fetchval(_STORED_BYTES) - before
        runs = await database.fetchval("SELECT count(*) FROM state.runs WHERE agent = 'heavy'")
    finally:
        await database.close()
    report.add(str(HEAVY_SOCKETS), slices, prefix="heavy_")
    report.figures["heavy_stored_ratio"] = round(stored / max(1, runs * HEAVY_STEPS * HEAVY_RESULT_BYTES), 4)
    report.notes.append(HEAVY_NOTE)


if __name__ == "__main__":
    sys.exit(main())
