"""Events of the log as clients see them: one JSON object each, made once for all watchers. Owns no delivery."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

import orjson
from google.protobuf.timestamp_pb2 import Timestamp
from mainspring.v1 import events_pb2 as pb
from mainspring.v1 import types_pb2
from mainspring_kit.errors import MainspringError, Reason

from mainspring_gateway.core.frames import text_frame

# JSON objects under construction; the values are of JSON's types and fragments: Any.
Data = dict[str, Any]

TERMINAL_TYPES: Final = frozenset({"agent_completed", "agent_failed", "agent_cancelled", "agent_timed_out"})
# After these no text of an earlier model step can follow; agent_thinking ends its own step's alone.
_TEXT_ENDS: Final = TERMINAL_TYPES | {"agent_paused", "agent_waiting", "run_recovered"}
# What a payload that this release does not know is called, where the writer says that it may be skipped.
UNKNOWN_TYPE: Final = "unknown"


@dataclass(frozen=True, slots=True)
class EncodedEvent:
    """An event ready to send: its JSON, the same as a WebSocket frame, and what it says of the run's course.

    `step`: the model step that it ended, or 0. `ends_text`: no text of an earlier step can follow. `sub_run_id`: the
    run that it announces, or empty.
    """

    seq: int
    payload: bytes
    frame: bytes
    is_terminal: bool
    step: int = 0
    ends_text: bool = False
    sub_run_id: str = ""


def encode(event: pb.RunEvent) -> EncodedEvent:
    """Makes an event's JSON; INTERNAL for one that can't be shown: of a later release, or with a value of no use."""
    kind = event.WhichOneof("payload") or UNKNOWN_TYPE
    if kind == UNKNOWN_TYPE and not event.safe_to_skip:
        raise _unshowable(event, "it is of a later release than this gateway; update the gateway")
    try:
        fields: Data = {
            "op": "event",
            "type": kind,
            "run_id": event.run_id,
            "seq": event.seq,
            "event_time": time_text(event.event_time),
            "session_id": event.session_id,
            "agent": event.agent,
            "trace_id": event.trace_id,
        }
        if event.source_seq:
            fields["source_seq"] = event.source_seq
        fields["data"] = _DATA[kind](event)
        payload = orjson.dumps(fields)
    except (TypeError, ValueError, OverflowError) as error:
        raise _unshowable(event, f"a value of it has no place in JSON: {error}") from error
    return EncodedEvent(
        event.seq,
        payload,
        text_frame(payload),
        kind in TERMINAL_TYPES,
        step=event.agent_thinking.step,
        ends_text=kind in _TEXT_ENDS,
        sub_run_id=event.tool_executing.sub_run_id,
    )


def is_terminal(event: pb.RunEvent) -> bool:
    """Whether the event is its run's last."""
    return event.WhichOneof("payload") in TERMINAL_TYPES


def sse_block(event: EncodedEvent) -> bytes:
    """An event as one block of a text/event-stream. Line breaks in JSON are white space, but end a line there."""
    payload = event.payload
    if b"\n" in payload or b"\r" in payload:
        payload = payload.replace(b"\n", b" ").replace(b"\r", b" ")
    return b"id: %d\ndata: %b\n\n" % (event.seq, payload)


def time_text(time: Timestamp) -> str:
    """A time as RFC 3339 with milliseconds, in UTC."""
    return _time_text(time.seconds, time.nanos // 1_000_000)


def leaf(value: bytes) -> orjson.Fragment | None:
    """A JSON value that passes through as it was made; null where there is none."""
    return orjson.Fragment(value) if value else None


def usage_data(usage: types_pb2.Usage) -> Data:
    """What model calls used."""
    return {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens, "cost_usd": usage.cost_usd}


def error_data(error: types_pb2.RunError) -> Data:
    """A run's error, with its metadata in one order: the same bytes live and from the log."""
    return {
        "code": error.code,
        "reason": error.reason,
        "message": error.message,
        "metadata": dict(sorted(error.metadata.items())),
    }


def stages_data(stages: Sequence[types_pb2.Stage]) -> list[Data]:
    """The stages of a run with their durations."""
    return [{"name": stage.name, "duration_ms": stage.duration_ms} for stage in stages]


def approval_kind(kind: int) -> str:
    """Why a person is asked."""
    return _KINDS.get(kind, UNKNOWN_TYPE)


def decision_text(decision: int) -> str:
    """What became of an approval; `open`: nothing yet."""
    return _DECISIONS.get(decision, UNKNOWN_TYPE) if decision else "open"


def _unshowable(event: pb.RunEvent, why: str) -> MainspringError:
    return MainspringError(
        Reason.INTERNAL,
        f"Event {event.seq} of run {event.run_id} can't be shown: {why}.",
        request_id=event.append_id,
    )


@lru_cache(maxsize=256)
def _time_text(seconds: int, milliseconds: int) -> str:
    """Cached, because all events of one commit have one time."""
    return f"{datetime.fromtimestamp(seconds, UTC).strftime('%Y-%m-%dT%H:%M:%S')}.{milliseconds:03d}Z"


def _started(event: pb.RunEvent) -> Data:
    started = event.agent_started
    data: Data = {
        "agent_version": started.agent_version,
        "input": leaf(started.input),
        "ordinal": started.ordinal,
        "attempt": started.attempt,
    }
    if event.parent_run_id:
        data["parent_run_id"] = event.parent_run_id
    if event.root_run_id:
        data["root_run_id"] = event.root_run_id
    if started.source_run_id:
        data["source_run_id"] = started.source_run_id
    if started.source_seq:
        data["source_seq"] = started.source_seq
    return data


def _thinking(event: pb.RunEvent) -> Data:
    thinking = event.agent_thinking
    return {
        "step": thinking.step,
        "text": thinking.text,
        "model": thinking.model,
        "usage": usage_data(thinking.usage),
        "planned_calls": [{"call_id": call.call_id, "tool": call.tool} for call in thinking.planned_calls],
    }


def _executing(event: pb.RunEvent) -> Data:
    executing = event.tool_executing
    data: Data = {
        "call_id": executing.call_id,
        "tool": executing.tool,
        "arguments": leaf(executing.arguments),
        "effect": _EFFECTS.get(executing.effect, UNKNOWN_TYPE),
        "attempt": executing.attempt,
    }
    if executing.HasField("wake_time"):
        data["wake_time"] = time_text(executing.wake_time)
    if executing.sub_run_id:
        data["sub_run_id"] = executing.sub_run_id
    return data


def _outcome(event: pb.RunEvent) -> Data:
    outcome = event.tool_completed
    data: Data = {
        "call_id": outcome.call_id,
        "tool": outcome.tool,
        "status": _STATUSES.get(outcome.status, UNKNOWN_TYPE),
    }
    if outcome.HasField("error"):
        error = outcome.error
        data["error"] = {"code": error.code, "reason": error.reason, "message": error.message}
    else:
        data["result"] = leaf(outcome.result)
    data["cached"] = outcome.cached
    data["duration_ms"] = outcome.duration_ms
    data["attempts"] = outcome.attempts
    return data


def _completed(event: pb.RunEvent) -> Data:
    completed = event.agent_completed
    return {
        "result": leaf(completed.result),
        "usage": usage_data(completed.usage),
        "duration_ms": completed.duration_ms,
        "stages": stages_data(completed.stages),
    }


def _failed(event: pb.RunEvent) -> Data:
    return {"error": error_data(event.agent_failed.error), "duration_ms": event.agent_failed.duration_ms}


def _timed_out(event: pb.RunEvent) -> Data:
    return {"error": error_data(event.agent_timed_out.error), "duration_ms": event.agent_timed_out.duration_ms}


def _cancelled(event: pb.RunEvent) -> Data:
    cancelled = event.agent_cancelled
    return {
        "requested_by": cancelled.requested_by,
        "reason": cancelled.reason,
        "receipt": [
            {"call_id": row.call_id, "acknowledged": row.acknowledged, "after_ms": row.after_ms}
            for row in cancelled.receipt
        ],
        "duration_ms": cancelled.duration_ms,
    }


def _recovered(event: pb.RunEvent) -> Data:
    recovered = event.run_recovered
    return {
        "attempt": recovered.attempt,
        "executor": recovered.executor,
        "lost_calls": list(recovered.lost_calls),
        "handed_back": recovered.handed_back,
    }


def _paused(event: pb.RunEvent) -> Data:
    return {"requested_by": event.agent_paused.requested_by, "reason": event.agent_paused.reason}


def _resumed(event: pb.RunEvent) -> Data:
    return {"requested_by": event.agent_resumed.requested_by}


def _waiting(event: pb.RunEvent) -> Data:
    waiting = event.agent_waiting
    data: Data = {
        "for": _WAITS.get(waiting.wait_for, UNKNOWN_TYPE),
        "detail": waiting.detail,
        "call_ids": list(waiting.call_ids),
    }
    if waiting.HasField("until"):
        data["until"] = time_text(waiting.until)
    return data


def _requested(event: pb.RunEvent) -> Data:
    asked = event.approval_requested
    data: Data = {
        "approval_id": asked.approval_id,
        "kind": approval_kind(asked.kind),
        "title": asked.title,
        "arguments": leaf(asked.arguments),
        "answer_schema": leaf(asked.answer_schema),
        "role": asked.role,
        "call_id": asked.call_id,
    }
    if asked.HasField("expires_time"):
        data["expires_time"] = time_text(asked.expires_time)
    return data


def _resolved(event: pb.RunEvent) -> Data:
    resolved = event.approval_resolved
    return {
        "approval_id": resolved.approval_id,
        "decision": decision_text(resolved.decision),
        "data": leaf(resolved.data),
        "by": resolved.by,
    }


def _signalled(event: pb.RunEvent) -> Data:
    signal = event.signal_received
    return {"name": signal.name, "data": leaf(signal.data), "by": signal.by}


def _handed_off(event: pb.RunEvent) -> Data:
    handed = event.agent_handed_off
    return {
        "from": handed.from_agent,
        "to": handed.to_agent,
        "to_version": handed.to_version,
        "reason": handed.reason,
    }


def _attempt_failed(event: pb.RunEvent) -> Data:
    failed = event.attempt_failed
    data: Data = {"attempt": failed.attempt, "error": error_data(failed.error)}
    if failed.step:
        data["step"] = failed.step
    if failed.call_id:
        data["call_id"] = failed.call_id
    if failed.HasField("retry_time"):
        data["retry_time"] = time_text(failed.retry_time)
    return data


def _names(prefix: str, values: Sequence[tuple[str, int]]) -> dict[int, str]:
    return {number: name.removeprefix(prefix).lower() for name, number in values}


_EFFECTS: Final = _names("EFFECT_CLASS_", types_pb2.EffectClass.items())
_STATUSES: Final = _names("TOOL_STATUS_", types_pb2.ToolStatus.items())
_WAITS: Final = _names("WAIT_KIND_", types_pb2.WaitKind.items())
_KINDS: Final = _names("APPROVAL_KIND_", types_pb2.ApprovalKind.items())
_DECISIONS: Final = _names("APPROVAL_DECISION_", types_pb2.ApprovalDecision.items())

_DATA: Final[dict[str, Callable[[pb.RunEvent], Data]]] = {
    "agent_started": _started,
    "agent_thinking": _thinking,
    "tool_executing": _executing,
    "tool_completed": _outcome,
    "agent_completed": _completed,
    "agent_failed": _failed,
    "agent_cancelled": _cancelled,
    "agent_timed_out": _timed_out,
    "run_recovered": _recovered,
    "agent_paused": _paused,
    "agent_resumed": _resumed,
    "agent_waiting": _waiting,
    "approval_requested": _requested,
    "approval_resolved": _resolved,
    "signal_received": _signalled,
    "agent_handed_off": _handed_off,
    "attempt_failed": _attempt_failed,
    UNKNOWN_TYPE: lambda event: {},
}
