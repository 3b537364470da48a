"""Why an append is refused: by itself, or by the database's word for it. What its sender has to be told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mainspring.v1 import state_pb2, types_pb2
from mainspring_kit.errors import MainspringError, Reason

if TYPE_CHECKING:
    from mainspring_state.core.append import Entry

EVENT_BYTES_MAX: Final = 16 << 20
# How many of a tenant's runs may be QUEUED where the create does not say.
BACKLOG_DEFAULT: Final = 100_000
BACKLOG_RETRY_SECONDS: Final = 5.0


def state_name(state: int) -> str:
    """The state's name without its prefix."""
    value = types_pb2.RunState.DESCRIPTOR.values_by_number.get(state)
    return "" if value is None else value.name.removeprefix("RUN_STATE_")


def refusal(entry: Entry, reason: str, *, run_id: str, state: int) -> MainspringError:
    """What the database's word for a refused append means to its sender."""
    create = entry.append.create
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
    if reason == "backlog":
        limit = create.backlog_max or BACKLOG_DEFAULT
        return MainspringError(
            Reason.BACKLOG_FULL,
            f"{limit} runs of the tenant stand in line, as many as may: wait until some have begun.",
            retry_after_seconds=BACKLOG_RETRY_SECONDS,
            limit=limit,
        )
    if reason == "unknown":
        return MainspringError(Reason.RUN_NOT_FOUND, f"There is no run {run_id}: create it first.", run_id=run_id)
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


def run_not_found(run_id: str) -> MainspringError:
    """The user has no such run."""
    return MainspringError(Reason.RUN_NOT_FOUND, f"There is no run {run_id!r}: check the id.", run_id=run_id[:128])


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


def invalid(append: state_pb2.Append, field: str, *, detail: str) -> MainspringError:
    return MainspringError(
        Reason.REQUEST_INVALID,
        f"The append to run {append.run_id or '?'} is not usable: {field}: {detail}.",
        field=field,
    )


def illegal(append: state_pb2.Append, name: str, *, detail: str) -> MainspringError:
    return MainspringError(
        Reason.TRANSITION_ILLEGAL,
        f"Run {append.run_id} cannot have {name} at this place: {detail}.",
        run_id=append.run_id,
        state="",
        event=name,
    )


def too_large(field: str, size_bytes: int) -> MainspringError:
    return MainspringError(
        Reason.PAYLOAD_TOO_LARGE,
        f"{field} has {size_bytes} bytes, at most {EVENT_BYTES_MAX} are taken: store it elsewhere and refer to it.",
        field=field,
        bytes=size_bytes,
        limit=EVENT_BYTES_MAX,
    )
