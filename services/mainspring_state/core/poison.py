"""How a run ends on which executor after executor died: its open calls closed, then agent_failed. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice

from mainspring.v1 import events_pb2, types_pb2

from mainspring_state.core.append import EVENTS_MAX


def poisoned(run: types_pb2.Run, calls: Mapping[str, str], *, attempts: int, now: float) -> list[events_pb2.RunEvent]:
    """The last events of a run. `calls`: its open ones; `now`: in seconds since 1970."""
    error = types_pb2.RunError(
        code="ABORTED",
        reason="RUN_POISONED",
        message=f"{attempts} executors in turn died on run {run.run_id} without a new event: look into it.",
        metadata={"run_id": run.run_id, "attempts": str(attempts)},
    )
    duration_ms = 0.0
    if run.HasField("start_time"):
        duration_ms = max(0.0, now - run.start_time.ToNanoseconds() / 1e9) * 1e3
    payloads: list[dict[str, object]] = [
        {
            "tool_completed": events_pb2.ToolCompleted(
                call_id=call_id, tool=tool, status=types_pb2.TOOL_STATUS_ERROR, error=error
            )
        }
        for call_id, tool in islice(calls.items(), EVENTS_MAX - 1)
    ]
    payloads.append({"agent_failed": events_pb2.AgentFailed(error=error, duration_ms=duration_ms)})
    return [
        events_pb2.RunEvent(
            run_id=run.run_id,
            seq=seq,
            session_id=run.session_id,
            agent=run.agent,
            trace_id=run.trace_id,
            **payload,  # type: ignore[arg-type]  # one of the payloads' own types
        )
        for seq, payload in enumerate(payloads, run.last_seq + 1)
    ]


def open_calls(before: Mapping[str, str], page: Iterable[events_pb2.RunEvent]) -> dict[str, str]:
    """The calls, each with its tool, that are open after a page of the log, given those that were open before it."""
    calls = dict(before)
    for event in page:
        kind = event.WhichOneof("payload")
        if kind == "tool_executing":
            calls[event.tool_executing.call_id] = event.tool_executing.tool
        elif kind == "tool_completed":
            calls.pop(event.tool_completed.call_id, None)
    return calls
