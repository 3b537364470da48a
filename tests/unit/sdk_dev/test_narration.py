"""Events as lines for people: each type says what matters, and an unknown one says what it holds."""

from __future__ import annotations

from typing import Any

import pytest
from mainspring.client import Event
from mainspring.narration import describe, short


def event(kind: str, data: dict[str, Any]) -> Event:  # Any: an event's data
    return Event(kind, "r", 1, data, {"event_time": "2026-11-24T10:00:00.000Z"})


@pytest.mark.parametrize(
    ("kind", "data", "line"),
    [
        ("agent_started", {"agent_version": "3", "input": {"a": 1}}, 'version 3, input {"a": 1}'),
        (
            "agent_thinking",
            {"text": "I will\nlook.", "planned_calls": [{"call_id": "c", "tool": "t.x"}]},
            "I will look.  → t.x",
        ),
        ("agent_thinking", {"text": ""}, "…"),
        ("tool_executing", {"tool": "t.x", "arguments": {"a": "ü"}}, 't.x {"a": "ü"}'),
        (
            "tool_completed",
            {"tool": "t.x", "status": "ok", "result": 5, "duration_ms": 1.6, "cached": True},
            "t.x ok in 2 ms, cached → 5",
        ),
        (
            "tool_completed",
            {
                "tool": "t.x",
                "status": "error",
                "error": {"code": "NOT_FOUND", "reason": "NO", "message": "m"},
                "duration_ms": 3,
            },
            "t.x error after 3 ms: NOT_FOUND / NO: m",
        ),
        ("agent_completed", {"duration_ms": 1234.5}, "in 1.2 s"),
        ("agent_failed", {"error": {"code": "UNKNOWN", "reason": "X", "message": "m"}}, "UNKNOWN / X: m"),
        ("agent_cancelled", {"requested_by": "ann", "reason": "enough"}, "by ann: enough"),
        ("run_recovered", {"executor": "e2", "attempt": 2}, "taken over by e2, attempt 2"),
        ("agent_paused", {"requested_by": "ann", "reason": ""}, "by ann; mainspring runs resume lets it go on"),
        ("agent_resumed", {"requested_by": "ann"}, "by ann"),
        (
            "agent_waiting",
            {"for": "signal", "detail": "the signal go", "until": "2026-11-24T10:00:00.000Z"},
            "for the signal go, until 2026-11-24T10:00:00.000Z at most",
        ),
        ("agent_waiting", {"for": "run"}, "for run"),
        (
            "approval_requested",
            {"approval_id": "r.4", "title": "May I?", "arguments": {"a": 1}},
            'May I? {"a": 1}  → mainspring approvals allow r.4',
        ),
        ("approval_resolved", {"decision": "allow", "by": "bob", "data": {"ok": True}}, 'allow by bob: {"ok": true}'),
        ("approval_resolved", {"decision": "expired", "by": "", "data": None}, "expired"),
        ("signal_received", {"name": "go", "data": False, "by": "ann"}, "go false by ann"),
        ("agent_handed_off", {"from": "a", "to": "b", "reason": "it knows"}, "a → b: it knows"),
        (
            "attempt_failed",
            {"step": 2, "attempt": 1, "error": {"code": "UNAVAILABLE", "reason": "X", "message": "m"}},
            "model step 2, attempt 1: UNAVAILABLE / X: m",
        ),
        ("something_new", {"x": 1}, '{"x": 1}'),
    ],
)
def test_an_event_is_one_line(kind: str, data: dict[str, Any], line: str) -> None:
    assert describe(event(kind, data)) == line


def test_a_long_value_is_cut() -> None:
    assert len(short("x" * 500)) == 100
    assert short("x" * 500).endswith("…")
