"""What a paced load generator makes of the frames it gets: first events, gaps between calls, and faults."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.paced import Record

pytestmark = pytest.mark.unit

# Any in this module: frames are JSON.


def event(seq: int, kind: str, agent: str = "lookup", **data: Any) -> dict[str, Any]:
    """An event frame of the run `run`."""
    return {"op": "event", "type": kind, "run_id": "run", "seq": seq, "agent": agent, "data": data}


def record_of(*frames: dict[str, Any]) -> Record:
    """A record that saw these frames, one a second."""
    record = Record({"lookup": 2, "clock": 4})
    record.sent["1"], record.started["1"] = 99.5, "run"
    for number, frame in enumerate(frames):
        record.take_event(frame, 100.0 + number)
    return record


def test_a_whole_run_has_a_first_event_and_no_fault() -> None:
    record = record_of(event(1, "agent_started"), event(2, "agent_completed"))
    assert (record.first_events(), record.arrivals, record.faults, record.ended) == (
        [0.5],
        {"run": [100.0, 101.0]},
        [],
        1,
    )


def test_a_gap_lies_between_the_end_of_a_call_and_the_beginning_of_the_next() -> None:
    record = record_of(
        event(1, "agent_started", "clock"),
        event(2, "tool_completed", "clock", result={"begin": 5.0, "end": 5.25}),
        event(3, "tool_completed", "clock", result={"begin": 5.5, "end": 6.0}),
        event(4, "agent_completed", "clock", result={}),
    )
    assert (record.gaps, record.faults) == ([0.25], [])


@pytest.mark.parametrize(
    ("frames", "fault"),
    [
        ([event(1, "agent_started"), event(3, "agent_completed")], "seq 3 came as frame 2 of its run"),
        ([event(1, "agent_completed")], "a run of lookup ended with agent_completed as event 1"),
        ([event(1, "agent_started"), event(2, "agent_failed")], "a run of lookup ended with agent_failed as event 2"),
    ],
    ids=["gap", "too short", "failed"],
)
def test_a_run_that_is_not_whole_is_a_fault(frames: list[dict[str, Any]], fault: str) -> None:
    assert record_of(*frames).faults == [fault]


def test_a_start_without_events_has_no_first_event() -> None:
    assert record_of().first_events() == []
