"""W5: faults at half of W1's peak, then a check of every run, frame and effect.

Prints what was done and what it cost; exit code 1 when anything was lost, doubled, missing, foreign or different.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Final

import asyncpg
import uvloop
from mainspring.dev import Stack, stack
from mainspring.dev.plan import TENANT, parse_replicas

from benchmarks.faults.checking import Checker, missing_logs, read_effects, read_logs, read_runs
from benchmarks.faults.load import Load, add_load, measure_peak
from benchmarks.faults.runs import MIX_WEIGHT, agents
from benchmarks.faults.takeover import takeovers
from benchmarks.faults.weather import PROCESSES, TARGETS, Weather
from benchmarks.harness import Report, parser, percentile, progress
from benchmarks.load import register

BREACHES: Final = ("lost", "doubled", "gaps", "foreign", "mismatched")
CALM_SECONDS_MAX: Final = 90.0
SECONDS_DEFAULT: Final = 120.0
SETTLE_SECONDS: Final = 2.0


def main() -> int:
    """Runs the drill and prints its report."""
    options = parser("faults", __doc__ or "")
    options.set_defaults(seconds=SECONDS_DEFAULT)
    options.add_argument("--target", choices=(*TARGETS, "all"), default="all", help="who is hit (default all)")
    options.add_argument("--rate", type=float, default=0.0, help="runs a second (default: half of W1's peak here)")
    options.add_argument(
        "--replicas",
        default=",".join(f"{name}=2" for name in PROCESSES),
        help="as of `mainspring dev` (default two of each but the registry)",
    )
    options.add_argument("--logs", default="", help="folder that gets the processes' logs")
    arguments = options.parse_args()
    report = Report(f"faults --target {arguments.target}", arguments.seed)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(drill(arguments, report))
    report.show(as_json=arguments.json)
    return 1 if report.faults else 0


async def drill(arguments: Namespace, report: Report) -> None:
    """The whole of it: a stack, its peak, the storm, the calm, the check."""
    replicas = parse_replicas(arguments.replicas)
    # Of the last minute: how much else the machine has to do.
    report.figures["load_average"] = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory(prefix="mainspring-faults-", ignore_cleanup_errors=True) as folder:
        data, effects = Path(folder) / "data", Path(folder) / "effects"
        effects.mkdir()
        async with stack(data_dir=data, replicas=replicas, log_level="info") as running:
            rate = arguments.rate or await measure_peak(running) / 2 / MIX_WEIGHT
            report.figures |= {"rate": round(rate, 1), "seconds": arguments.seconds}
            progress(f"{rate:.0f} runs a second for {arguments.seconds:g} s, seed {arguments.seed}")
            for spec in agents():
                await register(running, spec)
            weather = Weather(running, arguments.target, seed=arguments.seed, replicas=replicas)
            load = Load(
                running, rate=rate, seed=arguments.seed, effects=effects, is_marking=lambda: weather.is_refusing
            )
            try:
                await storm(load, weather, seconds=arguments.seconds)
                await check(running, load, effects, report)
            finally:
                if arguments.logs:
                    keep_logs(data / "logs", Path(arguments.logs))
            add_load(report, load)
            add_weather(report, load, weather)


async def storm(load: Load, weather: Weather, *, seconds: float) -> None:
    """The load with the faults in it, then the time that what is open needs to end."""
    async with asyncio.TaskGroup() as tasks:
        clients = await load.connect(tasks)
        loading = tasks.create_task(load.run())
        await asyncio.sleep(SETTLE_SECONDS)
        await weather.rage(seconds, load.settle)
        await asyncio.sleep(SETTLE_SECONDS)
        loading.cancel()
        progress(f"{len(load.runs)} runs were started, {load.open_runs} have not ended")
        try:
            await load.wait_ended(CALM_SECONDS_MAX)
        except TimeoutError:
            progress(f"{load.open_runs} runs did not end")
        for client in clients:
            client.cancel()


async def check(running: Stack, load: Load, effects: Path, report: Report) -> None:
    """Holds rows, frames and effects against each other."""
    progress("checking")
    users = [client.user for client in load.clients]
    connection = await asyncpg.connect(running.database_url)
    try:
        rows = await read_runs(connection, TENANT, users)
        checker = Checker(load.ledger, runs=load.runs, rows=rows, effects=read_effects(effects))
        seen = set()
        async for run_id, log in read_logs(connection, TENANT, users):
            seen.add(run_id)
            checker.check_log(run_id, log)
        for run_id in missing_logs(rows, seen):
            checker.check_log(run_id, [])
    finally:
        await connection.close()
    for client in load.clients:
        checker.check_foreign(client.user, client.logs)
    checker.finish()
    report.figures["started"] = sum(bool(run.acknowledged_time) for run in load.runs)
    report.figures["ended"] = sum(run.seen.has_ended for run in load.runs)
    report.figures |= {name: load.ledger.counts[name] for name in BREACHES}
    report.figures |= {"values_refused": checker.refused, "recovered": checker.recovered}
    if any(load.ledger.counts[name] for name in BREACHES):
        report.faults += load.ledger.notes


def add_weather(report: Report, load: Load, weather: Weather) -> None:
    """Takeover times, of all faults and of each kind, and how many of each there were."""
    openings = {client.user: client.openings for client in load.clients}
    found = takeovers(weather.faults, load.runs, openings)
    report.figures |= {"faults": len(weather.faults), "stalled": len(found)}
    for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
        report.figures[f"takeover_{name}_s"] = round(percentile(found, share), 3) if found else 0.0
    for label, count in sorted(Counter(fault.name for fault in weather.faults).items()):
        these = [fault for fault in weather.faults if fault.name == label]
        times = [round(seconds, 3) for seconds in takeovers(these, load.runs, openings)]
        told: dict[str, float] = {"count": count, "stalled": len(times)}
        if times:
            told |= {"p50": percentile(times, 0.5), "p99": percentile(times, 0.99), "max": max(times)}
        report.spreads[label] = told
        report.notes.append(f"{label}: " + ", ".join(f"{name} {value:g}" for name, value in told.items()))
    counts = {name: count for name, count in load.ledger.counts.items() if name not in BREACHES}
    report.notes.append("clients: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))


def keep_logs(source: Path, target: Path) -> None:
    """Copies the processes' logs to where they outlive the drill."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*.log"):
        (target / path.name).write_bytes(path.read_bytes())


if __name__ == "__main__":
    sys.exit(main())
