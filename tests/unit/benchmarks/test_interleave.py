"""The ratios of slices measured in turn: ours by a peer's, more than 1 always in our favour."""

from __future__ import annotations

import pytest

from benchmarks.harness import Report, Slice
from benchmarks.interleave import add_pairs, counted

pytestmark = pytest.mark.unit

NAN = float("nan")


def piece(rate: float, latency_ms: float, speed: float = 10.0) -> Slice:
    return Slice({"runs_per_second": rate, "p50_ms": latency_ms, "cpu_ms_per_run": latency_ms / 2}, speed)


def test_each_ratio_says_how_many_times_better_ours_is() -> None:
    report = Report("test", 1)
    pairs = [(piece(100, 2), piece(10, 40)), (piece(120, 2), piece(10, 60)), (piece(80, 2), piece(10, 20))]
    add_pairs("other", 64, pairs, report=report)
    assert report.ratios["other_runs_per_second_64"] == {"median": 10, "low": 8, "high": 12, "pairs": 3}
    assert report.ratios["other_p50_ms_64"] == {"median": 20, "low": 10, "high": 30, "pairs": 3}
    assert report.ratios["other_cpu_ms_per_run_64"]["median"] == 20
    assert report.peers["other"]["runs_per_second_64"] == 10
    assert report.figures["runs_per_second_64_beside_other"] == 100


def test_a_pair_beside_which_the_machine_was_slow_does_not_count() -> None:
    report = Report("test", 1)
    add_pairs("other", 1, [(piece(100, 2), piece(10, 40)), (piece(30, 9), piece(10, 40, speed=6.0))], report=report)
    assert report.ratios["other_runs_per_second_1"] == {"median": 10, "low": 10, "high": 10, "pairs": 1}


def test_a_pair_counts_if_both_its_slices_do() -> None:
    good, bad = piece(1, 1), piece(1, 1, speed=6.0)
    assert counted([]) == 0
    assert counted([(good, good), (good, bad), (bad, good), (bad, bad), (good, good)]) == 2


def test_a_pair_in_which_no_run_of_the_peers_ended_has_no_ratio() -> None:
    report = Report("test", 1)
    add_pairs("other", 1, [(piece(100, 2), piece(0, NAN)), (piece(90, 2), piece(10, 40))], report=report)
    assert report.ratios["other_runs_per_second_1"]["median"] == 9
    assert report.notes == ["other, 1 callers: no run ended in 1 of 2 slices"]


def test_a_peer_that_ends_nothing_has_no_ratios() -> None:
    report = Report("test", 1)
    add_pairs("other", 1, [(piece(100, 2), piece(0, NAN))], report=report)
    assert report.ratios == {}
    assert report.peers["other"]["runs_per_second_1"] == 0
