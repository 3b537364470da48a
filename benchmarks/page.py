"""Writes docs/benchmarks.md from the JSON of the workloads: `python -m benchmarks.page [FILE…]`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.goals import GOALS, Goal

DOCS: Final = Path(__file__).resolve().parents[1] / "docs"
RESULTS: Final = DOCS / "benchmarks"
PAGE: Final = DOCS / "benchmarks.md"
# Written by hand: what limits the figures, with the profiles that show it.
LIMITS: Final = RESULTS / "limits.md"
PROCESS_CPU: Final = re.compile(r"cpu_ms_per_run_(?P<process>[a-z_]+)_64")
BUSY_PERCENT_MAX: Final = 20.0
PEER_FIGURES: Final = {
    "runs_per_second": "runs a second",
    "p50_ms": "p50, ms",
    "p99_ms": "p99, ms",
    "cpu_ms_per_run": "CPU a run, ms",
}

# Any in this module: reports are JSON.
_HEAD: Final = """\
# Benchmarks

What was measured, beside what it should be. This page is made by `make bench`, which runs the workloads one after the
other, keeps their JSON in [benchmarks/](benchmarks/) and then runs `python -m benchmarks.page`; each can be run alone:

```bash
make bench-peers            # once: sets up the others that W1 is measured beside
make bench                  # everything, about 20 minutes, on a machine that does nothing else
{commands}
```

A figure is the median over slices, with the lowest and the highest in brackets. Beside each slice a fixed Python loop
shows how fast the machine is at that moment; slices beside which it was more than 30 percent slower than beside the
fastest are left out. Ratios are medians over pairs of slices that were measured in turn.
"""
_TITLES: Final = {
    "throughput": (
        "W1 and W1b: throughput",
        "N sockets, each back to back, from `start` to `agent_completed`: two model steps, one pure tool, six events, "
        "all durable (fsync and synchronous_commit on), all delivered. W1b: 20 steps, a tool result of 8 KiB each.",
    ),
    "latency": (
        "W2: latency at half of the peak",
        "Starts at an even pace over 64 sockets. The time of a commit is PostgreSQL's own, taken before the flush.",
    ),
    "cancel": (
        "W5: cancel",
        "16 users, each again and again: a run whose tool counts every 5 ms, a cancel on the socket, and a look "
        "whether the count then stands still.",
    ),
    "growth": (
        "W6: growth",
        "One call at a time over gRPC, short runs beside long ones, small tables beside large ones, in turns.",
    ),
    "footprint": ("W8: footprint", "The idle stack of `mainspring dev`, and how long it takes to start."),
}


def main() -> int:
    """Writes the page; exit code 2 when there is nothing to write it from."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__)
    options.add_argument("files", nargs="*", type=Path, help="JSON of workloads (default: docs/benchmarks/*.json)")
    options.add_argument("--output", type=Path, default=PAGE, help="the page (default docs/benchmarks.md)")
    arguments = options.parse_args()
    files = arguments.files or sorted(RESULTS.glob("*.json"))
    if not files:
        sys.stderr.write("There is no JSON of a workload: run `make bench`, or name files.\n")
        return 2
    reports = [json.loads(file.read_text()) for file in files]
    limits = LIMITS.read_text() if LIMITS.exists() else ""
    arguments.output.write_text(page(reports, limits))
    return 0


def page(reports: Sequence[Mapping[str, Any]], limits: str) -> str:
    """The whole page; workloads in the order of GOALS."""
    known = {report["workload"]: report for report in reports}
    found = [known[name] for name in GOALS if name in known]
    commands = "\n".join(_command(report["workload"], report) for report in found)
    parts = [_HEAD.format(commands=commands), *map(_workload, found), _surroundings(found)]
    if limits:
        parts.append(limits.strip() + "\n")
    return "\n".join(parts)


def _command(name: str, report: Mapping[str, Any]) -> str:
    peers = " --peers" if report["peers"] else ""
    return f"python -m benchmarks.{name} --json{peers}"


def _workload(report: Mapping[str, Any]) -> str:
    name = report["workload"]
    title, what = _TITLES[name]
    rows = [_row(goal, report) for goal in GOALS[name] if goal.figure in report["figures"]]
    lines = [f"## {title}", "", what, "", "| | measured | goal | |", "|---|---|---|---|", *rows]
    lines += _processes(report)
    if report["peers"]:
        lines += ["", *_peers(report)]
    lines += ["", f"{report['slices']} slices, {report['slices_discarded']} of them left out. Seed {report['seed']}."]
    lines += [f"{note[0].upper()}{note[1:]}." for note in report["notes"]]
    lines += [f"**Fault:** {fault}." for fault in report["faults"][:5]]
    return "\n".join(lines) + "\n"


def _row(goal: Goal, report: Mapping[str, Any]) -> str:
    value = report["figures"][goal.figure]
    spread = report["spreads"].get(goal.figure) or report["ratios"].get(goal.figure)
    between = f" ({number(spread['low'])} to {number(spread['high'])})" if spread else ""
    met = goal.is_met(value)
    verdict = "" if met is None else "reached" if met else "**missed**"
    return f"| {goal.title} | {number(value)}{between} | {goal.text()} | {verdict} |"


def _processes(report: Mapping[str, Any]) -> list[str]:
    """Where the CPU of one run goes, where a workload has looked."""
    found = {
        match["process"].replace("_", " "): value
        for name, value in report["figures"].items()
        if (match := PROCESS_CPU.fullmatch(name)) and value > 0
    }
    if not found:
        return []
    heads = " | ".join(found)
    cells = " | ".join(map(number, found.values()))
    title = "CPU of one run at 64 sockets by process, ms:"
    return ["", title, "", f"| {heads} |", "|" + "---|" * len(found), f"| {cells} |"]


def _peers(report: Mapping[str, Any]) -> list[str]:
    """Others beside us: a table for each number of callers, and the ratios."""
    lines = []
    for callers in _callers(report):
        columns = {"mainspring": report["figures"], **report["peers"]}
        lines += [
            f"The same work by others, {callers} at a time:",
            "",
            "| | " + " | ".join(PEER_FIGURES.values()) + " |",
            "|---|" + "---|" * len(PEER_FIGURES),
        ]
        for name, figures in columns.items():
            cells = [number(figures.get(f"{figure}_{callers}")) for figure in PEER_FIGURES]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["| ratio of pairs, above 1 is better | median | low | high | pairs |", "|---|---|---|---|---|"]
    for name, ratio in report["ratios"].items():
        cells = [number(ratio[key]) for key in ("median", "low", "high", "pairs")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _callers(report: Mapping[str, Any]) -> list[int]:
    suffixes = {
        name.removeprefix("runs_per_second_")
        for figures in report["peers"].values()
        for name in figures
        if name.startswith("runs_per_second_")
    }
    return sorted(int(suffix) for suffix in suffixes if suffix.isdigit())


def _surroundings(reports: Sequence[Mapping[str, Any]]) -> str:
    """The machine and the versions, as the first report has them; the load is of each."""
    lines = ["## Where it was measured", ""]
    if not reports:
        return "\n".join(lines)
    machine = reports[0]["machine"]
    busy = {report["workload"]: report["machine"]["busy_percent"] for report in reports}
    memory = f"{machine['memory'] / 2**30:.0f} GiB"
    lines += [
        f"- {machine['cores']} cores ({machine['processor']}), {memory}, {machine['system']}",
        f"- writing 8 KiB durably: {machine['fdatasync_ms']:g} ms (median)",
        "- busy with other work before it began: " + ", ".join(f"{name} {part:g} %" for name, part in busy.items()),
        "- " + ", ".join(f"{name} {version}" for name, version in reports[0]["versions"].items()),
    ]
    if max(busy.values()) > BUSY_PERCENT_MAX:
        lines += ["", "**The machine was busy with other work: times and rates on this page say little.**"]
    return "\n".join(lines) + "\n"


def number(value: float | None) -> str:
    """A figure as people read it: three digits that count, none behind the point from 100 on; a dash for none."""
    if value is None:
        return "–"
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


if __name__ == "__main__":
    sys.exit(main())
