"""Runs that go on with the work of another one: which may be retried, and from where one may be forked."""

from __future__ import annotations

import hashlib
from typing import Final

from mainspring.v1 import execution_pb2, types_pb2
from mainspring_kit.errors import MainspringError, Reason

from mainspring_execution.core.start import Origin, request_invalid

KEY_CHARACTERS_MAX: Final = 128
_RETRIED: Final = (types_pb2.RUN_STATE_FAILED, types_pb2.RUN_STATE_CANCELLED, types_pb2.RUN_STATE_TIMED_OUT)


def again(source: types_pb2.Run, *, key: str) -> execution_pb2.StartRunRequest:
    """The start of another run like this one. `key`: a repeated request gets its first answer by it."""
    return execution_pb2.StartRunRequest(
        agent=source.agent,
        version=source.agent_version,
        input=source.input,
        session_id=source.session_id,
        idempotency_key=key if len(key) <= KEY_CHARACTERS_MAX else hashlib.sha256(key.encode()).hexdigest(),
        priority=source.priority,
    )


def retry_of(source: types_pb2.Run) -> Origin:
    """TRANSITION_ILLEGAL for a run that has not ended, has completed, or is part of another one."""
    if source.state not in _RETRIED or source.parent_run_id:
        state = types_pb2.RunState.Name(source.state).removeprefix("RUN_STATE_")
        detail = f"belongs to run {source.parent_run_id}: retry that one" if source.parent_run_id else f"is {state}"
        raise MainspringError(
            Reason.TRANSITION_ILLEGAL,
            f"Run {source.run_id} {detail}. Only a run that failed, timed out or was cancelled is retried.",
            run_id=source.run_id,
            state=state,
            event="retry",
        )
    return Origin(source.run_id, attempt=max(source.attempt, 1) + 1)


def fork_of(source: types_pb2.Run, *, seq: int) -> Origin:
    """REQUEST_INVALID when there is no such event."""
    if seq > source.last_seq:
        raise request_invalid("seq", f"the log of run {source.run_id} ends with event {source.last_seq}")
    return Origin(source.run_id, seq)
