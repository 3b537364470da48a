"""Which appends are legal, and what each does to its run. The one place that knows the transitions of run states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import orjson
from mainspring.v1 import events_pb2, state_pb2, types_pb2

from mainspring_state.core.approvals import check_request, check_resolution
from mainspring_state.core.creation import ID_CHARACTERS_MAX, check_create, is_moment, is_uuid
from mainspring_state.core.refusals import EVENT_BYTES_MAX, illegal, invalid, state_name, too_large

EVENTS_MAX: Final = 64

QUEUED: Final = types_pb2.RUN_STATE_QUEUED
RUNNING: Final = types_pb2.RUN_STATE_RUNNING
WAITING: Final = types_pb2.RUN_STATE_WAITING
PAUSED: Final = types_pb2.RUN_STATE_PAUSED
COMPLETED: Final = types_pb2.RUN_STATE_COMPLETED
FAILED: Final = types_pb2.RUN_STATE_FAILED
CANCELLED: Final = types_pb2.RUN_STATE_CANCELLED
TIMED_OUT: Final = types_pb2.RUN_STATE_TIMED_OUT

# What an event leads to that leaves the run in its state.
SAME: Final = types_pb2.RUN_STATE_UNSPECIFIED

ENDED_STATES: Final = frozenset({COMPLETED, FAILED, CANCELLED, TIMED_OUT})


@dataclass(frozen=True, slots=True)
class Transition:
    """From which states an event may come (a bit mask), and to which it leads. `may_be_first`: a log may begin so."""

    from_states: int
    to_state: int
    may_be_first: bool = False
    is_progress: bool = True

    @property
    def is_end(self) -> bool:
        """Whether the event is the last of its log."""
        return self.to_state in ENDED_STATES


_RUNNING_ONLY: Final = 1 << RUNNING
_UNDER_WAY: Final = 1 << RUNNING | 1 << WAITING
_BEGUN: Final = _UNDER_WAY | 1 << PAUSED
_NOT_ENDED: Final = 1 << QUEUED | _BEGUN

# A run that was claimed before its turn stays QUEUED: it can be ended, not begun. One that was claimed while it waits
# or is paused stays so until it goes on: what came meanwhile is recorded first. The end of a paused run closes calls.
# With an answer it goes on: leave to make a call again is used up by whoever takes it, also if that one dies of it.
TRANSITIONS: Final = {
    "agent_started": Transition(_RUNNING_ONLY, RUNNING, may_be_first=True),
    "agent_thinking": Transition(_UNDER_WAY, RUNNING),
    "tool_executing": Transition(_UNDER_WAY, RUNNING),
    "tool_completed": Transition(_BEGUN, RUNNING),
    "agent_handed_off": Transition(_UNDER_WAY, RUNNING),
    "attempt_failed": Transition(_UNDER_WAY, SAME),
    "approval_requested": Transition(_UNDER_WAY, SAME),
    "approval_resolved": Transition(_BEGUN, RUNNING),
    "signal_received": Transition(_BEGUN, SAME),
    "agent_waiting": Transition(_UNDER_WAY, WAITING),
    "agent_paused": Transition(_UNDER_WAY, PAUSED),
    "agent_resumed": Transition(1 << PAUSED, RUNNING),
    "run_recovered": Transition(_RUNNING_ONLY, RUNNING, is_progress=False),
    "agent_completed": Transition(_RUNNING_ONLY, COMPLETED),
    "agent_failed": Transition(_NOT_ENDED, FAILED, may_be_first=True),
    "agent_cancelled": Transition(_NOT_ENDED, CANCELLED, may_be_first=True),
    "agent_timed_out": Transition(_NOT_ENDED, TIMED_OUT, may_be_first=True),
}
_OF_APPROVALS: Final = {"approval_requested": check_request, "approval_resolved": check_resolution}


@dataclass(frozen=True, slots=True)
class Ending:
    """What the run's row takes over from a terminal event: JSON texts and the result's own bytes."""

    result: bytes | None
    error: str | None
    stages: str
    usage: str


@dataclass(frozen=True, slots=True)
class Entry:
    """An append that may be committed. `run_key`: tenant and run. `from_states`: a bit mask of what it may find.

    `types`: of its events, none where the holder only lets go of the run or has consumed inputs; `to_state`: SAME, or
    where its run is behind it.
    """

    append: state_pb2.Append
    run_key: tuple[str, str]
    is_create: bool
    types: tuple[str, ...]
    from_states: int
    to_state: int
    is_progress: bool
    ending: Ending | None
    size_bytes: int


def check(append: state_pb2.Append) -> Entry:
    """Checks an append by itself; raises what its sender has to be told. Nothing of the log is known here."""
    run_key = _check_identity(append)
    events = list(append.events)
    if len(events) > EVENTS_MAX or not (events or append.HasField("release") or append.consumed_request_ids):
        raise invalid(append, "events", detail=f"an append has 1 to {EVENTS_MAX} events, not {len(events)}")
    size_bytes = 0
    seq = append.expected_seq
    for event in events:
        seq += 1
        if event.seq != seq:
            raise invalid(append, "events.seq", detail=f"an event has seq {event.seq} where {seq} comes next")
        if event.run_id != run_key[1]:
            raise invalid(append, "events.run_id", detail=f"event {seq} names another run")
        event_bytes = event.ByteSize()
        if event_bytes > EVENT_BYTES_MAX:
            raise too_large(f"event {seq}", event_bytes)
        size_bytes += event_bytes
    types = tuple([event.WhichOneof("payload") or "" for event in events])
    is_create = append.HasField("create")
    if is_create:
        check_create(append, types)
        size_bytes += len(append.create.input)
    from_states, to_state, is_progress = _follow(append, types)
    is_end = to_state in ENDED_STATES
    if append.HasField("release"):
        _check_release(append, is_wrong=is_create or is_end)
    return Entry(
        append=append,
        run_key=run_key,
        is_create=is_create,
        types=types,
        from_states=from_states,
        to_state=to_state,
        is_progress=is_progress,
        ending=_ending(types[-1], events[-1]) if is_end else None,
        size_bytes=size_bytes,
    )


def stamp(entry: Entry, *, seconds: int, nanos: int) -> None:
    """Writes into the events what only state may say: when they were made durable, and by which append."""
    append = entry.append
    append_id = append.append_id
    for event in append.events:
        event_time = event.event_time
        event_time.seconds, event_time.nanos = seconds, nanos
        event.append_id = append_id
    if entry.is_create:
        event = append.events[0]
        event.session_id, event.agent = append.create.session_id, append.create.agent
        event.trace_id = append.create.trace_id
        event.parent_run_id, event.root_run_id = append.create.parent_run_id, append.create.root_run_id
    if "agent_started" in entry.types:
        append.events[0].agent_started.ordinal = 0


def _check_identity(append: state_pb2.Append) -> tuple[str, str]:
    tenant_id, run_id = append.tenant_id, append.run_id
    if not tenant_id or len(tenant_id) > ID_CHARACTERS_MAX:
        raise invalid(append, "tenant_id", detail="it is missing or too long")
    if not is_uuid(run_id):
        raise invalid(append, "run_id", detail="it is not a UUID")
    if not is_uuid(append.append_id):
        raise invalid(append, "append_id", detail="it is not a UUID")
    return tenant_id, run_id


def _check_release(append: state_pb2.Append, *, is_wrong: bool) -> None:
    if is_wrong:
        raise invalid(append, "release", detail="a run is let go after its create and before its end")
    if not is_moment(append.release.due_time):
        raise invalid(append, "release.due_time", detail="it is before 1970 or after 9999")


def _follow(append: state_pb2.Append, types: tuple[str, ...]) -> tuple[int, int, bool]:
    """In which states the events may find the run, to which they lead it, and whether that is progress.

    An event that cannot come where it stands is refused.
    """
    from_states, to_state, is_progress = _NOT_ENDED, int(SAME), False
    is_first = append.expected_seq == 0
    for place, name in enumerate(types):
        transition = TRANSITIONS.get(name)
        if transition is None:
            raise invalid(append, "events", detail="an event has no payload that this release knows")
        if not transition.may_be_first if is_first else name == "agent_started":
            raise illegal(append, name, detail="a log begins with agent_started or its end, and nothing else does")
        if to_state != SAME and not transition.from_states >> to_state & 1:
            raise illegal(append, name, detail=f"the run is {state_name(to_state)} by then")
        if to_state == SAME:
            from_states &= transition.from_states
            if not from_states:
                raise illegal(append, name, detail="no run can have it behind the events before it")
        if name in _OF_APPROVALS:
            _OF_APPROVALS[name](append, append.events[place])
        to_state = transition.to_state or to_state
        is_progress = is_progress or transition.is_progress
        is_first = False
    return from_states, to_state, is_progress


def _ending(name: str, event: events_pb2.RunEvent) -> Ending:
    # Any: one of the four terminal payloads; all have stages and usage, three an error, one a result.
    payload: Any = getattr(event, name)
    error = payload.error if name in ("agent_failed", "agent_timed_out") else None
    return Ending(
        result=payload.result if name == "agent_completed" else None,
        error=None if error is None else _json(_error(error)),
        stages=_json([{"name": stage.name, "duration_ms": stage.duration_ms} for stage in payload.stages]),
        usage=_json(_usage(payload.usage)),
    )


def _error(error: types_pb2.RunError) -> dict[str, object]:
    return {
        "code": _storable(error.code),
        "reason": _storable(error.reason),
        "message": _storable(error.message),
        "metadata": {_storable(key): _storable(value) for key, value in error.metadata.items()},
    }


def _storable(text: str) -> str:
    """A tool's message may hold NUL, PostgreSQL's JSON may not; the event keeps the message as it came."""
    return text.replace("\x00", "\ufffd")


def _usage(usage: types_pb2.Usage) -> dict[str, object]:
    return {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cost_usd": usage.cost_usd,
    }


def _json(value: object) -> str:
    return orjson.dumps(value).decode()
