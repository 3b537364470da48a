"""Which calls a poisoned run has open, told page by page of its log."""

from __future__ import annotations

import pytest
from mainspring.v1 import events_pb2
from mainspring_state.core.poison import open_calls

pytestmark = pytest.mark.unit


def executing(call_id: str) -> events_pb2.RunEvent:
    return events_pb2.RunEvent(tool_executing=events_pb2.ToolExecuting(call_id=call_id, tool=f"tool of {call_id}"))


def done(call_id: str) -> events_pb2.RunEvent:
    return events_pb2.RunEvent(tool_completed=events_pb2.ToolCompleted(call_id=call_id))


def test_a_call_is_closed_by_a_later_page_and_its_page_before_stays_as_it_was() -> None:
    first = open_calls({}, [executing("a"), executing("b"), done("none")])
    second = open_calls(first, [done("a"), executing("c"), events_pb2.RunEvent()])
    assert first == {"a": "tool of a", "b": "tool of b"}
    assert second == {"b": "tool of b", "c": "tool of c"}
