"""Where a client goes on after a break: each run of the tree after its own last event, none that has ended."""

from __future__ import annotations

from typing import Any

import pytest
from mainspring.following import Position

pytestmark = pytest.mark.unit


def event(run_id: str, seq: int, kind: str = "agent_thinking", **data: Any) -> dict[str, Any]:  # Any: JSON
    return {"run_id": run_id, "seq": seq, "type": kind, "data": data}


def test_a_run_goes_on_after_its_last_event() -> None:
    position = Position()
    assert position.passes(event("r", 1)) and position.passes(event("r", 2))
    assert not position.passes(event("r", 2))
    assert position.frames() == [{"op": "follow", "id": "follow", "run_id": "r", "after_seq": 2}]


def test_what_is_below_is_not_shown_to_who_did_not_ask() -> None:
    position = Position("r")
    assert position.passes(event("r", 1, "tool_executing", sub_run_id="a"))
    assert not position.passes(event("a", 1))
    assert (position.shows("r"), position.shows("a"), len(position.frames())) == (True, False, 1)


def test_each_run_below_goes_on_by_itself_until_it_has_ended() -> None:
    position = Position("r", below={})
    assert not position.passes(event("a", 1))
    for frame in (
        event("r", 1, "tool_executing", sub_run_id="a"),
        event("r", 2, "tool_executing", sub_run_id="b"),
        event("a", 1, "tool_executing", sub_run_id="c"),
        event("b", 1),
        event("b", 2, "agent_completed"),
    ):
        assert position.passes(frame), frame
    assert not position.passes(event("a", 1)) and not position.passes(event("b", 3))
    assert [(frame["id"], frame["run_id"], frame["after_seq"]) for frame in position.frames()] == [
        ("follow", "r", 2),
        ("branch", "a", 1),
        ("branch", "c", 0),
    ]
    assert position.shows("c") and not position.shows("x")
