"""Why a run does not go on, as far as the database knows. Pure; `mainspring_execution` adds what its log tells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from mainspring.v1 import events_pb2, types_pb2

from mainspring_state.core.append import ENDED_STATES, PAUSED, QUEUED, RUNNING, WAITING

# How much of a log's end is looked at: agent_waiting and what was recorded around it.
TAIL_EVENTS: Final = 32

# What the attempt that failed last says of the next one's chances.
_BY_REASON: Final = {
    "WORKER_UNAVAILABLE": types_pb2.HOLD_KIND_NO_WORKER,
    "CIRCUIT_OPEN": types_pb2.HOLD_KIND_BREAKER,
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run stands in line: for its time, behind a cap (`run_ids` hold its slots), or for an executor."""

    kind: int
    cap: str
    limit: int
    run_ids: Sequence[str]
    position: int
    until: Timestamp | None


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What the database knows. `before`: runs before it in its session's line, at most 10 of `before_count`.

    `executor_id`: its holder, and whether that one beats; `alive_count`: how many executors do; `due_time`: from when
    on it is claimable; `sub_run_ids`: of those that have not ended; `tail`: the last events of its log.
    """

    executor_id: str
    is_alive: bool
    alive_count: int
    due_time: Timestamp | None
    before: Sequence[str]
    before_count: int
    approvals: Sequence[types_pb2.Approval]
    sub_run_ids: Sequence[str]
    tail: Sequence[events_pb2.RunEvent]
    places: Sequence[Place] = ()


def explain(run: types_pb2.Run, known: Circumstances, *, now: float) -> list[types_pb2.Hold]:
    """The reasons; none: it goes on, or has ended. `now`: in seconds since 1970."""
    if run.state in ENDED_STATES:
        return []
    holds = list(_explain_state(run, known))
    is_due = known.due_time is not None and known.due_time.ToNanoseconds() / 1e9 <= now
    is_due = is_due or any(place.kind == types_pb2.HOLD_KIND_BACKLOG for place in known.places)
    if not known.alive_count and (is_due or (run.state == RUNNING and known.due_time is None)):
        detail = "No executor is alive: start one, it goes on within a second."
        holds.append(types_pb2.Hold(kind=types_pb2.HOLD_KIND_NO_EXECUTOR, detail=detail))
    return holds


def _explain_state(run: types_pb2.Run, known: Circumstances) -> Iterator[types_pb2.Hold]:
    if run.state == QUEUED and known.before:
        others = f", and {known.before_count - 1} more are before it" if known.before_count > 1 else ""
        yield types_pb2.Hold(
            kind=types_pb2.HOLD_KIND_SESSION_LINE,
            detail=f"Run {known.before[0]} of its session {run.session_id} has not ended{others}: wait, or cancel it.",
            run_ids=known.before,
            position=known.before_count,
        )
    yield from map(_explain_place, known.places)
    if run.state == PAUSED:
        by = next((event.agent_paused.requested_by for event in reversed(known.tail) if _is(event, "agent_paused")), "")
        who = by or "somebody"
        yield types_pb2.Hold(kind=types_pb2.HOLD_KIND_PAUSED, detail=f"It was paused by {who}: resume it.")
    for approval in known.approvals:
        hold = types_pb2.Hold(
            kind=types_pb2.HOLD_KIND_APPROVAL,
            detail=f"Somebody with the role {approval.role} has to answer: {approval.title}",
            approval_id=approval.approval_id,
        )
        if approval.HasField("expires_time"):
            hold.until.CopyFrom(approval.expires_time)
        yield hold
    if known.sub_run_ids:
        yield types_pb2.Hold(
            kind=types_pb2.HOLD_KIND_SUB_RUN,
            detail=f"Sub-run {known.sub_run_ids[0]} has not ended: ask what that one waits for.",
            run_ids=known.sub_run_ids,
        )
    if run.state == WAITING:
        yield from _explain_waiting(known)


def _explain_place(place: Place) -> types_pb2.Hold:
    if place.kind == types_pb2.HOLD_KIND_CAP:
        detail = f"{place.limit} runs hold the slots of {place.cap!r}, and {place.position} wait for one before it."
    elif place.kind == types_pb2.HOLD_KIND_BACKLOG:
        detail = f"No executor has had room for it yet: {place.position} runs of its tenant stand before it."
    else:
        detail = "It is not to begin before its start time."
    return types_pb2.Hold(
        kind=place.kind,  # type: ignore[arg-type]  # the database holds numbers of the enum
        detail=detail,
        cap=place.cap,
        limit=place.limit,
        run_ids=place.run_ids,
        position=place.position,
        until=place.until,
    )


def _explain_waiting(known: Circumstances) -> Iterator[types_pb2.Hold]:
    waiting = next((event.agent_waiting for event in reversed(known.tail) if _is(event, "agent_waiting")), None)
    if waiting is None:
        return
    if waiting.wait_for == types_pb2.WAIT_KIND_SIGNAL:
        hold = types_pb2.Hold(kind=types_pb2.HOLD_KIND_SIGNAL, detail=f"It waits for {waiting.detail or 'a signal'}.")
    elif waiting.wait_for == types_pb2.WAIT_KIND_TIMER:
        hold = _explain_timer(waiting, known)
    else:
        # Approvals and sub-runs are known by themselves.
        return
    if waiting.HasField("until"):
        hold.until.CopyFrom(waiting.until)
    if len(waiting.call_ids) == 1:
        hold.call_id = waiting.call_ids[0]
    yield hold


def _explain_timer(waiting: events_pb2.AgentWaiting, known: Circumstances) -> types_pb2.Hold:
    for event in reversed(known.tail):
        if _is(event, "attempt_failed") and event.attempt_failed.retry_time == waiting.until:
            error = event.attempt_failed.error
            return types_pb2.Hold(
                kind=_BY_REASON.get(error.reason, types_pb2.HOLD_KIND_BACKOFF),
                detail=f"Attempt {event.attempt_failed.attempt} failed, the next one follows: {error.message}",
            )
    return types_pb2.Hold(kind=types_pb2.HOLD_KIND_TIMER, detail=f"It waits for {waiting.detail or 'a moment'}.")


def _is(event: events_pb2.RunEvent, kind: str) -> bool:
    return event.WhichOneof("payload") == kind
