"""What every workload needs: the running stack, CPU per process, a yardstick, and one form of report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Final

import psutil

YARDSTICK_FALL_MAX: Final = 0.3
_YARDSTICK_STEPS: Final = 2_000_000
_VERSIONS: Final = ("mainspring", "grpcio", "protobuf", "asyncpg", "redis", "aiohttp", "uvloop")


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
        return {name: sum(map(self._seconds, pids)) for name, pids in self._pids.items()}

    def _seconds(self, pid: int) -> float:
        try:
            process = psutil.Process(pid)
            # The load generator's children are the platform itself: they are counted under their own names.
            family = [process] if pid == os.getpid() else [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return 0.0
        total = 0.0
        for member in family:
            try:
                times = member.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system + times.children_user + times.children_system
            if pid == os.getpid():
                total -= times.children_user + times.children_system
        return total


@dataclass(slots=True)
class Report:
    """What one workload found."""

    workload: str
    seed: int
    figures: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    slices_discarded: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, suffix: str, figures: Mapping[str, float]) -> None:
        """Adds figures under `<name>_<suffix>`."""
        self.figures |= {f"{name}_{suffix}": round(value, 3) for name, value in figures.items()}

    def to_json(self) -> dict[str, Any]:
        """One flat JSON object. Any: JSON."""
        return {
            "workload": self.workload,
            "figures": self.figures,
            "peers": {},
            "ratios": {},
            "cpu_seconds": self.cpu_seconds,
            "slices_discarded": self.slices_discarded,
            "seed": self.seed,
            "versions": {name: version(name) for name in _VERSIONS} | {"python": platform.python_version()},
            "machine": {
                "cores": os.cpu_count(),
                "system": platform.platform(),
                "memory": psutil.virtual_memory().total,
            },
            "notes": self.notes,
        }

    def show(self, *, as_json: bool) -> None:
        """A table on standard error, so that standard output holds nothing but the JSON."""
        for name, value in self.figures.items():
            sys.stderr.write(f"{name:40} {value:12,.3f}\n")
        for slice_name, seconds in self.cpu_seconds.items():
            parts = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
            sys.stderr.write(f"CPU seconds, {slice_name}: {parts}\n")
        for note in self.notes:
            sys.stderr.write(f"note: {note}\n")
        if as_json:
            sys.stdout.write(json.dumps(self.to_json()) + "\n")


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which this share of all lie; nan for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


def median(values: Iterable[float]) -> float:
    """The median; nan for none."""
    ordered = list(values)
    return statistics.median(ordered) if ordered else float("nan")


def parser(workload: str, description: str) -> argparse.ArgumentParser:
    """The options that every workload has."""
    options = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{workload}",
        description=description,
        epilog=f"example: python -m benchmarks.{workload} --json --seconds 10",
    )
    options.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    options.add_argument("--seconds", type=float, default=5.0, help="length of each measured slice (default 5)")
    options.add_argument("--peers", action="store_true", help="also measure peers, where a workload has them")
    options.add_argument("--seed", type=int, default=1, help="seed of what is random (default 1)")
    return options
