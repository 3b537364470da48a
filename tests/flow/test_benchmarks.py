"""Each workload runs to its end and prints one JSON object with its figures, however short its slices."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks.goals import GOALS
from tests.tidy.source import ROOT

pytestmark = [pytest.mark.long, pytest.mark.real_services, pytest.mark.performance, pytest.mark.timeout(300)]

WORKLOADS = {
    "throughput": ("--sockets", "1", "64"),
    "latency": ("--rate", "50"),
    "cancel": ("--users", "2"),
    "growth": ("--rows", "100", "1000", "--lengths", "12", "100"),
    "footprint": (),
}
# What the arguments above leave out, or name otherwise.
ABSENT = {"throughput": ("_256",), "growth": ("_10_", "_10000_", "_1000000_")}


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_workload_prints_one_json_object_with_its_figures(workload: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{workload}", "--json", "--seconds", "1", "--repeat", "1"]
    done = subprocess.run(
        [*command, *WORKLOADS[workload]],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    report = json.loads(done.stdout)
    assert (report["workload"], report["faults"], report["peers"]) == (workload, [], {})
    assert report["slices"] > 0
    assert report["machine"]["cores"]
    assert report["cpu_seconds"] or workload == "footprint"
    expected = {
        goal.figure for goal in GOALS[workload] if not any(part in goal.figure for part in ABSENT.get(workload, ()))
    }
    uneven = {note.partition(":")[0] for note in report["notes"]}
    assert expected - set(report["figures"]) - uneven == set()
    assert all(isinstance(value, int | float) for value in report["figures"].values())
