"""The arithmetic of the benchmarks: percentiles, slices that count, ratios of pairs, and the report's form."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

from benchmarks.harness import Report, Slice, cpu_seconds, keep, median, percentile, repeated, spread, under_test

pytestmark = pytest.mark.unit


def pieces(*figures_and_speeds: tuple[float, float]) -> list[Slice]:
    """Slices with one figure each, and the speed of the machine beside it."""
    return [Slice({"runs": figure}, speed) for figure, speed in figures_and_speeds]


@pytest.mark.parametrize(
    ("share", "value"), [(0.0, 1.0), (0.5, 51.0), (0.99, 100.0), (0.989, 99.0), (1.0, 100.0)], ids=str
)
def test_a_percentile_is_the_value_below_which_that_share_lies(share: float, value: float) -> None:
    assert percentile([float(number) for number in range(100, 0, -1)], share) == value


def test_nothing_has_no_percentile_and_no_median() -> None:
    assert math.isnan(percentile([], 0.5))
    assert math.isnan(median([]))


def test_slices_beside_which_the_machine_was_much_slower_do_not_count() -> None:
    assert keep(pieces((1, 10.0), (1, 7.0), (1, 6.9), (1, 9.0))) == [True, True, False, True]
    assert keep([]) == []


def test_a_spread_is_median_low_and_high() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}


def test_a_figure_is_the_median_of_the_slices_that_count() -> None:
    report = Report("throughput", 1)
    report.add("64", pieces((100, 10.0), (300, 10.0), (110, 9.0), (1, 5.0)), prefix="heavy_")
    assert report.figures == {"heavy_runs_64": 110}
    assert report.spreads == {"heavy_runs_64": {"median": 110, "low": 100, "high": 300}}
    assert (report.slices, report.slices_discarded) == (4, 1)


def test_a_pair_counts_only_if_both_its_slices_do() -> None:
    report = Report("throughput", 1)
    ours = pieces((100, 10.0), (900, 5.0), (120, 10.0), (110, 9.0))
    theirs = pieces((50, 10.0), (50, 10.0), (20, 5.0), (50, 10.0))
    report.compare("peer", ours, theirs, "runs")
    assert report.ratios == {"peer": {"median": 2.1, "low": 2.0, "high": 2.2, "pairs": 2}}


def test_without_a_pair_that_counts_there_is_no_ratio_but_a_note() -> None:
    report = Report("throughput", 1)
    report.compare("peer", pieces((1, 10.0)), pieces((1, 1.0)), "runs")
    assert report.ratios == {}
    assert report.notes == ["peer: the machine was too uneven, no pair of slices counts"]


def test_what_could_not_be_measured_is_left_out_of_the_json() -> None:
    report = Report("latency", 7)
    report.add("", [Slice({"p50_ms": float("nan"), "rate": 5.0}, 1.0)])
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["figures"] == {"rate": 5.0}
    assert {"workload", "figures", "peers", "ratios", "cpu_seconds", "slices_discarded", "seed", "versions"} < set(
        found
    )


def test_a_peer_has_figures_named_as_ours() -> None:
    report = Report("throughput", 1)
    report.add_peer("other", "64", pieces((5, 1.0), (7, 1.0)))
    assert report.peers == {"other": {"runs_64": 6}}
    assert report.figures == {}


def test_the_load_generator_is_not_under_test() -> None:
    assert under_test({"state": 1.0, "gateway": 2.0, "load generator": 4.0}) == 3.0


@pytest.mark.parametrize(
    ("speeds", "count"),
    [([10.0] * 9, 5), ([10.0, 1.0, 1.0, 1.0, 1.0, 9.0, 9.0], 7), ([10.0, *[1.0] * 20], 10)],
    ids=str,
)
async def test_an_uneven_machine_is_measured_longer_but_not_for_ever(speeds: list[float], count: int) -> None:
    left = iter(speeds)

    async def measure() -> Slice:
        return Slice({"runs": 1.0}, next(left))

    assert len(await repeated(measure, 5, title="a test")) == count


def test_cpu_of_children_counts_under_test_but_not_for_the_load_generator() -> None:
    burn = "sum(range(3_000_000))"
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert cpu_seconds(os.getpid()) > cpu_seconds(os.getpid(), alone=True) > 0
