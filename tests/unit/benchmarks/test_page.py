"""docs/benchmarks.md as it is made from reports: figures beside goals, peers beside us, and what was left out."""

from __future__ import annotations

import pytest

from benchmarks.goals import GOALS, Goal
from benchmarks.harness import Report, Slice
from benchmarks.page import number, page

pytestmark = pytest.mark.unit


def test_figures_stand_beside_goals_with_their_spread() -> None:
    report = Report("throughput", 3, notes=["something was left out"])
    slices = [Slice({"runs_per_second": runs, "p99_ms": 120.0}, 10.0) for runs in (1_500.0, 1_600.0, 1_700.0)]
    report.add("64", slices)
    text = page([report.to_json()], "## What limits it\n\nThe processor.\n")
    assert "| 64 sockets: runs a second | 1,600 (1,500 to 1,700) | ≥ 1,500 | reached |" in text
    assert "| 64 sockets: p99, ms | 120 (120 to 120) | ≤ 90 | **missed** |" in text
    assert "3 slices, 0 of them left out. Seed 3.\nSomething was left out." in text
    assert text.endswith("## What limits it\n\nThe processor.\n")


def test_the_cpu_of_a_run_is_shown_by_process() -> None:
    report = Report("throughput", 1)
    report.add(
        "64", [Slice({"cpu_ms_per_run": 0.9, "cpu_ms_per_run_state": 0.4, "cpu_ms_per_run_load_generator": 0.5}, 1)]
    )
    assert "| state | load generator |\n|---|---|\n| 0.40 | 0.50 |\n" in page([report.to_json()], "")


def test_peers_stand_beside_us_for_each_number_of_callers() -> None:
    report = Report("throughput", 1)
    ours = [Slice({"runs_per_second": 300.0, "p50_ms": 3.0}, 1.0)]
    theirs = [Slice({"runs_per_second": 100.0, "p50_ms": 9.0}, 1.0)]
    report.add("1", ours)
    report.add_peer("other", "1", theirs)
    report.compare("other_runs_per_second_1", ours, theirs, "runs_per_second")
    text = page([report.to_json()], "")
    assert "| mainspring | 300 | 3 | – | – |\n| other | 100 | 9 | – | – |" in text
    assert "| other_runs_per_second_1 | 3 | 3 | 3 | 1 |" in text
    assert "python -m benchmarks.throughput --json --peers" in text


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal("x", "x", at_least=5), True),
        (Goal("x", "x", at_least=6), False),
        (Goal("x", "x", at_most=5), True),
        (Goal("x", "x", at_most=4), False),
        (Goal("x", "x"), None),
    ],
)
def test_a_goal_is_the_least_or_the_most(goal: Goal, met: bool | None) -> None:
    assert goal.is_met(5) is met


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (1234.5, "1,234"), (123.4, "123"), (99.96, "100.0"), (1.239, "1.24"), (12.0, "12"), (0.004, "0.00")],
)
def test_numbers_are_as_people_read_them(value: float | None, text: str) -> None:
    assert number(value) == text


def test_no_figure_has_two_goals() -> None:
    for goals in GOALS.values():
        figures = [goal.figure for goal in goals]
        assert len(figures) == len(set(figures))


@pytest.mark.parametrize(("busy", "warned"), [(3.0, False), (60.0, True)])
def test_figures_of_a_busy_machine_are_said_to_be_worth_little(busy: float, warned: bool) -> None:
    report = Report("footprint", 1, busy_percent=busy)
    assert ("The machine was busy" in page([report.to_json()], "")) is warned
