"""What a create says of lines: caps, weights, priorities, times, backlogs."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from mainspring.v1 import state_pb2
from mainspring_kit.errors import MainspringError
from mainspring_state.core import append as core
from mainspring_state.core import refusals
from mainspring_state.store import extras

from tests.unit.state.samples import RUN, create

pytestmark = pytest.mark.unit


def asked(**fields: Any) -> state_pb2.Append:
    """A create with changes (Any: CreateRun's fields)."""
    append = create()
    append.create.MergeFrom(state_pb2.CreateRun(**fields))
    return append


def cap(scope: str = "tenant", limit: int = 1) -> state_pb2.Cap:
    return state_pb2.Cap(scope=scope, limit=limit)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"caps": [cap(limit=0)]}, "create.caps.limit"),
        ({"caps": [cap("")]}, "create.caps.scope"),
        ({"caps": [cap("s" * 301)]}, "create.caps.scope"),
        ({"caps": [cap("a\0b")]}, "create.caps.scope"),
        ({"caps": [cap(), cap()]}, "create.caps"),
        ({"caps": [cap(f"scope-{number}") for number in range(9)]}, "create.caps"),
        ({"weight": 1_001}, "create.weight"),
        ({"weight": -1}, "create.weight"),
        ({"backlog_max": -1}, "create.backlog_max"),
        ({"priority": 101}, "create.priority"),
        ({"due_time": {"seconds": 1 << 40}}, "create.due_time"),
    ],
)
def test_what_no_line_is_made_of_is_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(MainspringError) as raised:
        core.check(asked(**fields))
    assert (raised.value.reason_name, raised.value.metadata["field"]) == ("REQUEST_INVALID", field)


@pytest.mark.parametrize("fields", [{"caps": [cap()]}, {"queue_only": True}, {"due_time": {"seconds": 1}}])
def test_a_sub_run_stands_in_no_line(fields: dict[str, Any]) -> None:
    parent = {"parent_run_id": RUN[:-1] + "f", "root_run_id": RUN, "parent_call_id": "c", "depth": 1}
    core.check(asked(**parent))
    with pytest.raises(MainspringError, match="stands in no line"):
        core.check(asked(**parent, **fields))


def test_a_full_backlog_is_said_with_its_bound_and_when_to_come_back() -> None:
    error = refusals.refusal(core.check(asked(backlog_max=7)), "backlog", run_id=RUN, state=0)
    assert (error.reason_name, error.metadata, error.retry_after_seconds) == ("BACKLOG_FULL", {"limit": "7"}, 5.0)
    error = refusals.refusal(core.check(create()), "backlog", run_id=RUN, state=0)
    assert error.metadata == {"limit": "100000"}


def test_only_what_is_to_come_is_a_time_to_wait_for() -> None:
    moment = Timestamp(seconds=10, nanos=5)
    creates = [
        asked(due_time={"seconds": 10, "nanos": nanos}).create if nanos else create().create for nanos in (0, 5, 6)
    ]
    stands, queue_onlys, dues, *_ = extras.of_lines(creates, moment)
    assert stands == [False, False, True]
    assert queue_onlys == []
    assert [due is not None for due in dues] == [False, False, True]


def test_creates_that_stand_in_no_line_bring_no_arguments() -> None:
    stands, queue_onlys, dues, weights, backlogs, least, *caps = extras.of_lines(
        [create().create] * 2, asked().create.due_time
    )
    assert (stands, queue_onlys, dues, weights, caps) == ([], [], [], [], [[], [], []])
    assert (backlogs, least) == ([100_000] * 2, 100_000)
