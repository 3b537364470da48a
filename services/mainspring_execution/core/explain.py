"""What a run is doing, or why it does not go on, as its log tells: the same on every executor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from mainspring.v1 import events_pb2, types_pb2

from mainspring_execution.core.intrinsic import is_intrinsic
from mainspring_execution.core.progress import Progress
from mainspring_execution.core.waits import wait_of

_BY_WAIT: Final = {
    types_pb2.WAIT_KIND_APPROVAL: types_pb2.HOLD_KIND_APPROVAL,
    types_pb2.WAIT_KIND_SIGNAL: types_pb2.HOLD_KIND_SIGNAL,
    types_pb2.WAIT_KIND_TIMER: types_pb2.HOLD_KIND_TIMER,
    types_pb2.WAIT_KIND_RUN: types_pb2.HOLD_KIND_SUB_RUN,
}
# What the last failed attempt says of the next one's chances.
_BY_REASON: Final = {
    "WORKER_UNAVAILABLE": types_pb2.HOLD_KIND_NO_WORKER,
    "CIRCUIT_OPEN": types_pb2.HOLD_KIND_BREAKER,
}


def explain(progress: Progress, *, executor_id: str, now: float) -> list[types_pb2.Hold]:
    """The holds of a run that has begun and not ended. `executor_id`: who holds it; empty: nobody.

    `now`: in seconds since 1970.
    """
    if progress.paused:
        return [types_pb2.Hold(kind=types_pb2.HOLD_KIND_PAUSED, detail="Somebody paused it: resume it.")]
    calls = progress.open_calls()
    if calls:
        return list(_explain_calls(progress, calls, executor_id=executor_id, now=now))
    if progress.failures and progress.retry_times[""] > now:
        step = f"model step {progress.steps + 1}"
        return [_explain_failure(progress, "", error=progress.failures[-1].error, doing=step)]
    if not executor_id:
        return []
    detail = f"Model step {progress.steps + 1} is under way on executor {executor_id}."
    return [types_pb2.Hold(kind=types_pb2.HOLD_KIND_MODEL, detail=detail)]


def merge(known: Iterable[types_pb2.Hold], told: Iterable[types_pb2.Hold]) -> list[types_pb2.Hold]:
    """What the database knows, and what only the log tells."""
    holds = list(known)
    kinds = {hold.kind for hold in holds}
    return holds + [hold for hold in told if hold.kind not in kinds]


def _explain_calls(
    progress: Progress, calls: Iterable[events_pb2.PlannedCall], *, executor_id: str, now: float
) -> Iterator[types_pb2.Hold]:
    for call in calls:
        intent = progress.intents.get(call.call_id)
        if intent is None:
            continue
        asked = progress.approvals.get(call.call_id)
        if asked is not None:
            hold = types_pb2.Hold(
                kind=types_pb2.HOLD_KIND_APPROVAL,
                detail=f"It waits for an answer to: {asked.title}",
                approval_id=asked.approval_id,
            )
            if asked.HasField("expires_time"):
                hold.until.CopyFrom(asked.expires_time)
        elif is_intrinsic(call.tool):
            hold = _explain_wait(intent)
        elif progress.retry_times.get(call.call_id, 0.0) > now:
            error = progress.call_failures[call.call_id]
            hold = _explain_failure(progress, call.call_id, error=error, doing=f"the tool {call.tool}")
        else:
            hold = types_pb2.Hold(
                kind=types_pb2.HOLD_KIND_TOOL,
                detail=f"The tool {call.tool} was called"
                + (
                    f" by executor {executor_id} and has not answered." if executor_id else ", and nobody waits for it."
                ),
            )
        hold.call_id = call.call_id
        yield hold


def _explain_wait(intent: events_pb2.ToolExecuting) -> types_pb2.Hold:
    wait = wait_of(intent.tool)
    hold = types_pb2.Hold(
        kind=_BY_WAIT.get(wait.kind, types_pb2.HOLD_KIND_TIMER) if wait is not None else types_pb2.HOLD_KIND_SUB_RUN,
        detail=f"It waits for {wait.describe(intent) if wait is not None else intent.tool}.",
        run_ids=[intent.sub_run_id] if intent.sub_run_id else [],
    )
    if intent.HasField("wake_time"):
        hold.until.CopyFrom(intent.wake_time)
    return hold


def _explain_failure(progress: Progress, key: str, *, error: types_pb2.RunError, doing: str) -> types_pb2.Hold:
    hold = types_pb2.Hold(
        kind=_BY_REASON.get(error.reason, types_pb2.HOLD_KIND_BACKOFF),
        detail=f"The last attempt at {doing} failed, the next one follows: {error.message}",
    )
    hold.until.FromMicroseconds(int(progress.retry_times[key] * 1e6))
    return hold
