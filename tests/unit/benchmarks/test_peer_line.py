"""The line protocol between the benchmarks and a peer: what a slice counts, and how a child tells of its failures."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import Report
from benchmarks.peers.child import Child, PeerLoad, child, figures_of
from benchmarks.peers.environment import Program, UnavailableError, make_all
from benchmarks.peers.line import QUESTION, Wanted, measure

pytestmark = pytest.mark.unit


@pytest.fixture
async def peer(tmp_path: Path) -> AsyncIterator[Child]:
    async with child(Path(sys.executable), "tests.unit.benchmarks.sample_peer", log=tmp_path / "log") as running:
        await running.prepare(database_url="", redis_url="", folder=tmp_path, callers=2)
        yield running


def wanted(callers: int, seconds: float, wait_seconds: float = 5.0) -> Wanted:
    return Wanted("", callers, seconds, wait_seconds=wait_seconds, drain_seconds=wait_seconds)


async def test_a_slice_counts_the_runs_that_end_between_its_phases() -> None:
    ended = 0
    counts: list[int] = []

    async def run() -> object:
        nonlocal ended
        await asyncio.sleep(0)
        ended += 1
        return QUESTION

    def say(message: Mapping[str, Any]) -> None:  # Any: JSON
        counts.append(ended)

    ran = await measure(run, wanted(3, 0.01), say=say)
    assert counts[0] >= 3
    assert len(ran["durations"]) == counts[1] - counts[0]
    assert ran["faults"] == []


async def test_runs_that_keep_in_step_are_counted_in_whole_bursts() -> None:
    waiting: list[asyncio.Event] = []

    async def run_in_step() -> object:
        mine = asyncio.Event()
        waiting.append(mine)
        if len(waiting) == 5:
            for event in waiting:
                event.set()
            waiting.clear()
        await mine.wait()
        return QUESTION

    ran = await measure(run_in_step, wanted(5, 0.01), say=lambda message: None)
    assert len(ran["durations"]) >= 5
    assert len(ran["durations"]) % 5 == 0


async def test_a_wrong_answer_is_a_fault_and_no_run() -> None:
    async def run() -> object:
        await asyncio.sleep(0)
        return "forty-three"

    ran = await measure(run, wanted(1, 0.0), say=lambda message: None)
    assert ran["durations"] == []
    assert "forty-three" in ran["faults"][0]


async def test_runs_that_do_not_end_are_given_up() -> None:
    async def run() -> object:
        await asyncio.Event().wait()
        return QUESTION

    ran = await measure(run, wanted(2, 0.0, wait_seconds=0.01), say=lambda message: None)
    assert ran["durations"] == []
    assert "given up" in ran["faults"][0]


async def test_a_child_measures_its_variants_and_names_its_processes_and_versions(peer: Child, tmp_path: Path) -> None:
    report = Report("test", 1)
    piece = await PeerLoad("sample", "right", peer=peer, others={}, report=report).measure(2, 0.05)
    assert piece.figures["runs_per_second"] > 0
    assert piece.figures["p50_ms"] > 0
    assert list(peer.pids) == [str(tmp_path)]
    assert list(peer.versions) == ["protobuf"]
    assert report.notes == []


async def test_a_peers_wrong_answers_are_noted(peer: Child) -> None:
    report = Report("test", 1)
    piece = await PeerLoad("sample", "wrong", peer=peer, others={}, report=report).measure(1, 0.0)
    assert piece.figures["runs_per_second"] == 0
    assert "forty-three" in report.notes[0]
    assert report.faults == []


async def test_a_failure_of_a_peer_carries_its_reason_and_leaves_it_in_step(peer: Child) -> None:
    with pytest.raises(UnavailableError, match="ValueError: no such thing"):
        await peer.run("failing", 1, seconds=0.0, counted={})
    ran, _ = await peer.run("right", 1, seconds=0.0, counted={})
    assert ran["durations"]


async def test_the_death_of_a_peer_is_told_with_its_last_words(peer: Child) -> None:
    with pytest.raises(UnavailableError, match="its program ended; it said last: what a library prints"):
        await peer.run("dying", 1, seconds=0.0, counted={})


async def test_a_program_that_can_not_start_is_unavailable(tmp_path: Path) -> None:
    async with child(Path(sys.executable), "tests.unit.benchmarks.nowhere", log=tmp_path / "log") as running:
        with pytest.raises(UnavailableError, match="No module named"):
            await running.prepare(database_url="", redis_url="", folder=tmp_path, callers=1)


def test_no_run_has_no_latency() -> None:
    figures = figures_of([], 2.0, {"peer": 1.0, "load generator": 5.0})
    assert figures["runs_per_second"] == 0
    assert figures["cpu_ms_per_run"] != figures["cpu_ms_per_run"]


def test_the_load_generator_costs_a_peer_nothing() -> None:
    figures = figures_of([0.1, 0.2], 2.0, {"peer": 1.0, "load generator": 5.0})
    assert figures["runs_per_second"] == 1.0
    assert figures["cpu_ms_per_run"] == 500.0


def test_a_peer_that_can_not_be_set_up_is_left_out_with_the_reason() -> None:
    program = Program("nowhere", {"nowhere": ""}, python_least=(3, 90))
    with pytest.raises(UnavailableError, match="make bench-peers"):
        program.require()
    assert list(make_all([program])) == ["nowhere: left out, it needs Python 3.90 or later, and there is none here"]
