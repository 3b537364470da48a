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
# What a payload that this release does not know is called, where the writer says that it may be skipped.
UNKNOWN_TYPE: Final = "unknown"


@dataclass(frozen=True, slots=True)
class EncodedEvent:
    """An event ready to send: its JSON, the same as a WebSocket frame, and whether it is the run's last."""

    seq: int
    payload: bytes
    frame: bytes
    is_terminal: bool


def encode(event: pb.RunEvent) -> EncodedEvent:
    """Makes an event's JSON; INTERNAL for one that can't be shown: of a later release, or with a value of no use."""
    kind = event.WhichOneof("payload") or UNKNOWN_TYPE
    if kind == UNKNOWN_TYPE and not event.safe_to_skip:
        raise _unshowable(event, "it is of a later release than this gateway; update the gateway")
    try:
        payload = orjson.dumps(
            {
                "op": "event",
                "type": kind,
                "run_id": event.run_id,
                "seq": event.seq,
                "event_time": time_text(event.event_time),
                "session_id": event.session_id,
                "agent": event.agent,
                "trace_id": event.trace_id,
                "data": _DATA[kind](event),
            }
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise _unshowable(event, f"a value of it has no place in JSON: {error}") from error
    return EncodedEvent(event.seq, payload, text_frame(payload), kind in TERMINAL_TYPES)


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
    return {
        "call_id": executing.call_id,
        "tool": executing.tool,
        "arguments": leaf(executing.arguments),
        "effect": _EFFECTS.get(executing.effect, UNKNOWN_TYPE),
        "attempt": executing.attempt,
    }


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
    }


def _names(prefix: str, values: Sequence[tuple[str, int]]) -> dict[int, str]:
    return {number: name.removeprefix(prefix).lower() for name, number in values}


_EFFECTS: Final = _names("EFFECT_CLASS_", types_pb2.EffectClass.items())
_STATUSES: Final = _names("TOOL_STATUS_", types_pb2.ToolStatus.items())

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
    UNKNOWN_TYPE: lambda event: {},
}
