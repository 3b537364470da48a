"""Which appends are legal, and what each does to its run. The one place that knows the transitions of run states."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import orjson
from mainspring.v1 import events_pb2, state_pb2, types_pb2
from mainspring_kit.errors import MainspringError, Reason

EVENTS_MAX: Final = 64
EVENT_BYTES_MAX: Final = 16 << 20
ID_CHARACTERS_MAX: Final = 128

QUEUED: Final = types_pb2.RUN_STATE_QUEUED
RUNNING: Final = types_pb2.RUN_STATE_RUNNING
WAITING: Final = types_pb2.RUN_STATE_WAITING
PAUSED: Final = types_pb2.RUN_STATE_PAUSED
COMPLETED: Final = types_pb2.RUN_STATE_COMPLETED
FAILED: Final = types_pb2.RUN_STATE_FAILED
CANCELLED: Final = types_pb2.RUN_STATE_CANCELLED
TIMED_OUT: Final = types_pb2.RUN_STATE_TIMED_OUT

ENDED_STATES: Final = frozenset({COMPLETED, FAILED, CANCELLED, TIMED_OUT})

_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# The last second of the year 9999, where calendars of databases and languages still agree.
_SECONDS_MAX: Final = 253_402_300_799
_POLICIES: Final = frozenset(types_pb2.SessionPolicy.values())


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
_NOT_ENDED: Final = 1 << QUEUED | 1 << RUNNING | 1 << WAITING | 1 << PAUSED

# A run that was claimed before its turn stays QUEUED: it can be ended, not begun.
TRANSITIONS: Final = {
    "agent_started": Transition(_RUNNING_ONLY, RUNNING, may_be_first=True),
    "agent_thinking": Transition(_RUNNING_ONLY, RUNNING),
    "tool_executing": Transition(_RUNNING_ONLY, RUNNING),
    "tool_completed": Transition(_RUNNING_ONLY, RUNNING),
    "run_recovered": Transition(_RUNNING_ONLY, RUNNING, is_progress=False),
    "agent_completed": Transition(_RUNNING_ONLY, COMPLETED),
    "agent_failed": Transition(_NOT_ENDED, FAILED, may_be_first=True),
    "agent_cancelled": Transition(_NOT_ENDED, CANCELLED, may_be_first=True),
    "agent_timed_out": Transition(_NOT_ENDED, TIMED_OUT, may_be_first=True),
}


@dataclass(frozen=True, slots=True)
class Ending:
    """What the run's row takes over from a terminal event: JSON texts and the result's own bytes."""

    result: bytes | None
    error: str | None
    stages: str
    usage: str


@dataclass(frozen=True, slots=True)
class Entry:
    """An append that may be committed. `run_key`: tenant and run. `from_states`: a bit mask of what it may find."""

    append: state_pb2.Append
    run_key: tuple[str, str]
    is_create: bool
    types: tuple[str, ...]
    from_states: int
    to_state: int
    is_progress: bool
    ending: Ending | None
    size_bytes: int


def is_uuid(text: str) -> bool:
    """Whether a text is a UUID in its one canonical form, as all run ids are."""
    return _UUID.fullmatch(text) is not None


def check(append: state_pb2.Append) -> Entry:
    """Checks an append by itself; raises what its sender has to be told. Nothing of the log is known here."""
    run_key = _check_identity(append)
    events = list(append.events)
    if not 1 <= len(events) <= EVENTS_MAX:
        raise _invalid(append, "events", detail=f"an append has 1 to {EVENTS_MAX} events, not {len(events)}")
    size_bytes = 0
    seq = append.expected_seq
    for event in events:
        seq += 1
        if event.seq != seq:
            raise _invalid(append, "events.seq", detail=f"an event has seq {event.seq} where {seq} comes next")
        if event.run_id != run_key[1]:
            raise _invalid(append, "events.run_id", detail=f"event {seq} names another run")
        event_bytes = event.ByteSize()
        if event_bytes > EVENT_BYTES_MAX:
            raise _too_large(f"event {seq}", event_bytes)
        size_bytes += event_bytes
    types = tuple([event.WhichOneof("payload") or "" for event in events])
    is_create = append.HasField("create")
    if is_create:
        _check_create(append, types)
        size_bytes += len(append.create.input)
    transitions = _follow(append, types)
    return Entry(
        append=append,
        run_key=run_key,
        is_create=is_create,
        types=types,
        from_states=transitions[0].from_states,
        to_state=transitions[-1].to_state,
        is_progress=transitions[-1].is_progress or any(transition.is_progress for transition in transitions),
        ending=_ending(types[-1], events[-1]) if transitions[-1].is_end else None,
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
    if entry.types[0] == "agent_started":
        append.events[0].agent_started.ordinal = 0


def state_name(state: int) -> str:
    """The state's name without its prefix."""
    value = types_pb2.RunState.DESCRIPTOR.values_by_number.get(state)
    return "" if value is None else value.name.removeprefix("RUN_STATE_")


def refusal(entry: Entry, reason: str, *, run_id: str, state: int) -> MainspringError:
    """What the database's word for a refused append means to its sender."""
    asked, create = entry.append, entry.append.create
    name = state_name(state)
    if reason == "key_reused":
        return MainspringError(
            Reason.IDEMPOTENCY_KEY_REUSED,
            f"The idempotency key {create.idempotency_key!r} started run {run_id} with another request: use a new key.",
            idempotency_key=create.idempotency_key,
            run_id=run_id,
        )
    if reason == "exists":
        return MainspringError(
            Reason.RUN_EXISTS, f"A run {run_id} exists already: start with a new run id.", run_id=run_id
        )
    if reason == "busy":
        return MainspringError(
            Reason.SESSION_BUSY,
            f"Session {create.session_id} has a run under way and its policy is to refuse others: wait for its end.",
            session_id=create.session_id,
        )
    if reason == "unknown":
        return MainspringError(
            Reason.RUN_NOT_FOUND, f"There is no run {asked.run_id}: create it first.", run_id=asked.run_id
        )
    if reason == "ended":
        return MainspringError(
            Reason.RUN_ENDED, f"Run {run_id} has ended as {name}: nothing can follow.", run_id=run_id, state=name
        )
    if reason == "illegal":
        return MainspringError(
            Reason.TRANSITION_ILLEGAL,
            f"Run {run_id} is {name}: {entry.types[0]} cannot come now.",
            run_id=run_id,
            state=name,
            event=entry.types[0],
        )
    return stale(entry)


def stale(entry: Entry) -> MainspringError:
    """The append does not continue the log, or its holder is not the holder any more."""
    return MainspringError(
        Reason.APPEND_STALE,
        f"Run {entry.append.run_id} is not at seq {entry.append.expected_seq} under epoch {entry.append.epoch}: "
        "another executor drives it, let it go.",
        run_id=entry.append.run_id,
        expected_seq=entry.append.expected_seq,
    )


def unsettled(entry: Entry) -> MainspringError:
    """The database has not taken the append, for no fault of its own: another moment will do."""
    return MainspringError(
        Reason.PEER_UNAVAILABLE,
        f"PostgreSQL did not settle the append at seq {entry.append.expected_seq + 1} of run {entry.append.run_id}: "
        "send it again.",
        peer="postgresql",
    )


def refused_value(entry: Entry, detail: str) -> MainspringError:
    """The database refused a value of this append alone."""
    return MainspringError(
        Reason.EVENT_REFUSED,
        f"The database refused the append at seq {entry.append.expected_seq + 1} of run {entry.append.run_id}: "
        f"{detail}. End the run without this value.",
        run_id=entry.append.run_id,
        detail=detail,
    )


def _check_identity(append: state_pb2.Append) -> tuple[str, str]:
    tenant_id, run_id = append.tenant_id, append.run_id
    if not tenant_id or len(tenant_id) > ID_CHARACTERS_MAX:
        raise _invalid(append, "tenant_id", detail="it is missing or too long")
    if not is_uuid(run_id):
        raise _invalid(append, "run_id", detail="it is not a UUID")
    if not is_uuid(append.append_id):
        raise _invalid(append, "append_id", detail="it is not a UUID")
    return tenant_id, run_id


def _check_create(append: state_pb2.Append, types: tuple[str, ...]) -> None:
    create = append.create
    if types != ("agent_started",) or append.expected_seq != 0 or append.epoch != 1:
        raise _invalid(append, "create", detail="a create has exactly agent_started, expected_seq 0 and epoch 1")
    for field in ("user_id", "session_id", "executor_id"):
        if not 1 <= len(getattr(create, field)) <= ID_CHARACTERS_MAX:
            raise _invalid(append, f"create.{field}", detail=f"it has 1 to {ID_CHARACTERS_MAX} characters")
    # One value that no column holds would have the whole batch committed in halves.
    for field in ("user_id", "session_id", "idempotency_key", "agent", "agent_version", "executor_id", "trace_id"):
        if "\x00" in getattr(create, field):
            raise _invalid(append, f"create.{field}", detail="it holds a NUL character")
    if create.policy not in _POLICIES:
        raise _invalid(append, "create.policy", detail="it is none that this release knows")
    if len(create.idempotency_key) > ID_CHARACTERS_MAX:
        raise _invalid(append, "create.idempotency_key", detail=f"it has at most {ID_CHARACTERS_MAX} characters")
    if not 0 <= create.deadline.seconds <= _SECONDS_MAX or not 0 <= create.deadline.nanos < 1_000_000_000:
        raise _invalid(append, "create.deadline", detail="it is before 1970 or after 9999")
    if len(create.input) > EVENT_BYTES_MAX:
        raise _too_large("create.input", len(create.input))


def _follow(append: state_pb2.Append, types: tuple[str, ...]) -> list[Transition]:
    """What the events do, one after the other; an event that cannot come where it stands is refused."""
    transitions: list[Transition] = []
    is_first = append.expected_seq == 0
    state: int = RUNNING
    for name in types:
        transition = TRANSITIONS.get(name)
        if transition is None:
            raise _invalid(append, "events", detail="an event has no payload that this release knows")
        if not transition.may_be_first if is_first else name == "agent_started":
            raise _illegal(append, name, detail="a log begins with agent_started or its end, and nothing else does")
        if transitions and not transition.from_states >> state & 1:
            raise _illegal(append, name, detail="it follows an event that ends the run")
        transitions.append(transition)
        state, is_first = transition.to_state, False
    return transitions


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


def _invalid(append: state_pb2.Append, field: str, *, detail: str) -> MainspringError:
    return MainspringError(
        Reason.REQUEST_INVALID,
        f"The append to run {append.run_id or '?'} is not usable: {field}: {detail}.",
        field=field,
    )


def _illegal(append: state_pb2.Append, name: str, *, detail: str) -> MainspringError:
    return MainspringError(
        Reason.TRANSITION_ILLEGAL,
        f"Run {append.run_id} cannot have {name} at this place: {detail}.",
        run_id=append.run_id,
        state="",
        event=name,
    )


def _too_large(field: str, size_bytes: int) -> MainspringError:
    return MainspringError(
        Reason.PAYLOAD_TOO_LARGE,
        f"{field} has {size_bytes} bytes, at most {EVENT_BYTES_MAX} are taken: store it elsewhere and refer to it.",
        field=field,
        bytes=size_bytes,
        limit=EVENT_BYTES_MAX,
    )
