"""Why a run that stands in line does not go on, in words."""

from __future__ import annotations

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from mainspring.v1 import types_pb2
from mainspring_state.core.holds import Circumstances, Place, explain

pytestmark = pytest.mark.unit

QUEUED = types_pb2.Run(run_id="r", state=types_pb2.RUN_STATE_QUEUED)


def holds(*places: Place, alive_count: int = 1) -> list[types_pb2.Hold]:
    known = Circumstances("", False, alive_count, None, [], 0, [], [], [], places)
    return explain(QUEUED, known, now=1.0)


def test_a_cap_is_named_with_its_limit_its_holders_and_who_stands_before() -> None:
    (hold,) = holds(Place(types_pb2.HOLD_KIND_CAP, "agent/lookup", 2, ["a", "b"], 5, None))
    assert (hold.kind, hold.cap, hold.limit, hold.position) == (types_pb2.HOLD_KIND_CAP, "agent/lookup", 2, 5)
    assert list(hold.run_ids) == ["a", "b"]
    assert hold.detail == "2 runs hold the slots of 'agent/lookup', and 5 wait for one before it."


def test_a_run_in_line_for_an_executor_says_so_and_whether_there_is_one() -> None:
    place = Place(types_pb2.HOLD_KIND_BACKLOG, "", 0, [], 3, None)
    (hold,) = holds(place)
    assert (hold.kind, hold.position) == (types_pb2.HOLD_KIND_BACKLOG, 3)
    assert [hold.kind for hold in holds(place, alive_count=0)] == [
        types_pb2.HOLD_KIND_BACKLOG,
        types_pb2.HOLD_KIND_NO_EXECUTOR,
    ]


def test_a_start_that_is_to_come_has_its_time() -> None:
    (hold,) = holds(Place(types_pb2.HOLD_KIND_TIMER, "", 0, [], 0, Timestamp(seconds=9)))
    assert (hold.kind, hold.until.seconds) == (types_pb2.HOLD_KIND_TIMER, 9)
