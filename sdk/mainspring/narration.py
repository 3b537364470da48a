"""Events as lines for people: what the command line and the examples print while a run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final

from mainspring.client import Event

_VALUE_CHARACTERS_MAX: Final = 100

# An event's data as parsed JSON: Any.
Data = Mapping[str, Any]


def describe(event: Event) -> str:
    """What happened, in one line without the type."""
    tell = _TELLERS.get(event.type)
    return tell(event.data) if tell is not None else short(event.data)


def event_time(event: Event) -> datetime:
    """When the event became durable."""
    return datetime.fromisoformat(event.frame["event_time"])


def short(value: Any) -> str:
    """A JSON value in one line, cut where it gets long. Any: JSON."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(", ", ": "))
    line = " ".join(text.split())
    return line if len(line) <= _VALUE_CHARACTERS_MAX else line[: _VALUE_CHARACTERS_MAX - 1] + "…"


def error_text(error: Data) -> str:
    """An error as it is told: code and reason, then the message."""
    return f"{error.get('code', 'UNKNOWN')} / {error.get('reason', '?')}: {error.get('message', '')}"


def _started(data: Data) -> str:
    return f"version {data.get('agent_version', '?')}, input {short(data.get('input', {}))}"


def _thinking(data: Data) -> str:
    planned = [call["tool"] for call in data.get("planned_calls") or ()]
    return short(data.get("text") or "…") + (f"  → {', '.join(planned)}" if planned else "")


def _executing(data: Data) -> str:
    return f"{data['tool']} {short(data.get('arguments', {}))}"


def _executed(data: Data) -> str:
    took = _duration(data.get("duration_ms", 0)) + (", cached" if data.get("cached") else "")
    if data.get("error"):
        return f"{data['tool']} {data.get('status', 'error')} after {took}: {error_text(data['error'])}"
    return f"{data['tool']} {data.get('status', 'ok')} in {took} → {short(data.get('result'))}"


def _completed(data: Data) -> str:
    return f"in {_duration(data.get('duration_ms', 0))}"


def _duration(milliseconds: float) -> str:
    return f"{milliseconds:.0f} ms" if milliseconds < 1_000 else f"{milliseconds / 1_000:.1f} s"


def _failed(data: Data) -> str:
    return error_text(data.get("error") or {})


def _cancelled(data: Data) -> str:
    reason = f": {data['reason']}" if data.get("reason") else ""
    return f"by {data.get('requested_by') or 'somebody'}{reason}"


def _recovered(data: Data) -> str:
    return f"taken over by {data.get('executor', 'another executor')}, attempt {data.get('attempt', '?')}"


def _paused(data: Data) -> str:
    return f"{_cancelled(data)}; mainspring runs resume lets it go on"


def _waiting(data: Data) -> str:
    until = f", until {data['until']} at most" if data.get("until") else ""
    return f"for {data.get('detail') or data.get('for', 'something')}{until}"


def _asked(data: Data) -> str:
    arguments = f" {short(data['arguments'])}" if data.get("arguments") else ""
    return f"{short(data.get('title', ''))}{arguments}  → mainspring approvals allow {data.get('approval_id', '')}"


def _answered(data: Data) -> str:
    by = f" by {data['by']}" if data.get("by") else ""
    return f"{data.get('decision', '?')}{by}" + (f": {short(data['data'])}" if data.get("data") is not None else "")


def _signalled(data: Data) -> str:
    brought = f" {short(data['data'])}" if data.get("data") is not None else ""
    return f"{data.get('name', '?')}{brought} by {data.get('by') or 'somebody'}"


def _handed_off(data: Data) -> str:
    return f"{data.get('from', '?')} → {data.get('to', '?')}" + (
        f": {short(data['reason'])}" if data.get("reason") else ""
    )


def _attempt_failed(data: Data) -> str:
    what = f"model step {data['step']}" if data.get("step") else f"call {data.get('call_id', '?')}"
    return f"{what}, attempt {data.get('attempt', '?')}: {error_text(data.get('error') or {})}"


_TELLERS: Final[Mapping[str, Callable[[Data], str]]] = {
    "agent_started": _started,
    "agent_thinking": _thinking,
    "tool_executing": _executing,
    "tool_completed": _executed,
    "agent_completed": _completed,
    "agent_failed": _failed,
    "agent_timed_out": _failed,
    "agent_cancelled": _cancelled,
    "run_recovered": _recovered,
    "agent_paused": _paused,
    "agent_resumed": _cancelled,
    "agent_waiting": _waiting,
    "approval_requested": _asked,
    "approval_resolved": _answered,
    "signal_received": _signalled,
    "agent_handed_off": _handed_off,
    "attempt_failed": _attempt_failed,
}
