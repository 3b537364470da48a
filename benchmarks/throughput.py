"""W1: N sockets, each back to back, from `start` to `agent_completed` of the scripted look-up run.

Two model steps, one pure tool, six events of five kinds, all durable, all delivered. A run counts only if its log came
whole. With --peers the same work by others, interleaved in one run.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import uvloop
from mainspring.dev import stack

from benchmarks.harness import Report, Slice, Subject, parser, progress
from benchmarks.load import LOOKUP, LOOKUP_EVENTS, LOOKUP_START, Load, connect_users, drive, register

WARM_UP_SECONDS = 2.0
WARM_UP_SOCKETS = 16


def main() -> int:
    """Runs the workload and prints its report; exit code 1 when a run was not whole."""
    options = parser("throughput", __doc__ or "")
    options.add_argument("--sockets", type=int, nargs="+", default=[1, 64, 256], help="how many (default 1 64 256)")
    options.add_argument("--replicas", default="", help="as of `mainspring dev`, e.g. execution=2")
    arguments = options.parse_args()
    report = Report("throughput", arguments.seed)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_measure(report, arguments))
    report.show(as_json=arguments.json)
    return 1 if report.faults else 0


async def _measure(report: Report, arguments: Namespace) -> None:
    counts = {
        name: int(count) for name, _, count in (part.partition("=") for part in arguments.replicas.split(",") if part)
    }
    with tempfile.TemporaryDirectory(prefix="mainspring-bench-") as folder:
        progress("starting the platform")
        async with stack(data_dir=Path(folder), replicas=counts, log_level="warning") as running:
            await register(running, LOOKUP.read_bytes())
            loops = await connect_users(running, max(arguments.sockets), start=LOOKUP_START, events=LOOKUP_EVENTS)
            await drive(running, loops[:WARM_UP_SOCKETS], WARM_UP_SECONDS)
            subjects: list[Subject] = [Load(running, loops, report)]
            for callers in arguments.sockets:
                await rounds(subjects, callers, arguments.seconds, arguments.repeat, report)


async def rounds(subjects: list[Subject], callers: int, seconds: float, repeat: int, report: Report) -> None:
    """Measures all subjects in turn, again and again, and reports the first's figures, the others' and their ratios."""
    slices: dict[str, list[Slice]] = {subject.name: [] for subject in subjects}
    for number in range(repeat):
        for subject in subjects:
            progress(f"{callers} callers, slice {number + 1} of {repeat}: {subject.name}")
            slices[subject.name].append(await subject.measure(callers, seconds))
    ours, *peers = slices
    report.add(str(callers), slices[ours])
    for peer in peers:
        report.add_peer(peer, str(callers), slices[peer])
        report.compare(f"runs_per_second_{callers}_by_{peer}", slices[ours], slices[peer], "runs_per_second")


if __name__ == "__main__":
    sys.exit(main())
