"""What may be asked of a run, and why it is refused. Which answer of an approval comes first, the database decides."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from mainspring.v1 import state_pb2, types_pb2
from mainspring_kit.errors import MainspringError, Reason

from mainspring_state.core.approvals import read_id
from mainspring_state.core.refusals import run_not_found, state_name

_ANSWERS: Final = (types_pb2.APPROVAL_DECISION_ALLOW, types_pb2.APPROVAL_DECISION_DENY)
_EXPIRED: Final = types_pb2.APPROVAL_DECISION_EXPIRED
_EVENTS: Final = {"pause": "agent_paused", "resume": "agent_resumed", "approval": "approval_resolved"}


def read_input(request: state_pb2.PutInputRequest, *, request_id: str, user_id: str) -> state_pb2.RunInput:
    """The input that a request asks for. APPROVAL_NOT_FOUND when it answers what is no approval of the run."""
    run_input = state_pb2.RunInput(run_id=request.run_id.lower(), request_id=request_id, requested_by=user_id)
    kind = request.WhichOneof("input") or ""
    asked = getattr(run_input, kind)
    asked.SetInParent()
    asked.CopyFrom(getattr(request, kind))
    if kind == "approval":
        known = read_id(request.approval.approval_id)
        if known is None or known[0] != run_input.run_id:
            raise approval_not_found(request.approval.approval_id)
    return run_input


def is_expiry(run_input: state_pb2.RunInput, *, is_service: bool) -> bool:
    """Whether the input says that an approval has expired, which only services may; refuses what decides nothing."""
    if not run_input.HasField("approval") or run_input.approval.decision in _ANSWERS:
        return False
    if run_input.approval.decision == _EXPIRED and is_service:
        return True
    raise MainspringError(
        Reason.REQUEST_INVALID, "An approval is answered by ALLOW or DENY.", field="approval.decision"
    )


def approval_not_found(approval_id: str) -> MainspringError:
    """The caller can see no such approval."""
    return MainspringError(
        Reason.APPROVAL_NOT_FOUND, f"There is no approval {approval_id!r}: check the id.", approval_id=approval_id
    )


def refused_input(run_input: state_pb2.RunInput, reason: str, *, state: int, limit: int) -> MainspringError:
    """What the database's word for a refused input means to who asked; empty: there is no such run or approval."""
    run_id, kind, name = run_input.run_id, run_input.WhichOneof("input") or "", state_name(state)
    if not reason:
        return approval_not_found(run_input.approval.approval_id) if kind == "approval" else run_not_found(run_id)
    if reason == "ended":
        return MainspringError(
            Reason.RUN_ENDED,
            f"Run {run_id} has ended as {name}: there is nothing to ask of it.",
            run_id=run_id,
            state=name,
        )
    if reason == "reused":
        return MainspringError(
            Reason.IDEMPOTENCY_KEY_REUSED,
            f"The request id {run_input.request_id!r} asked something else of run {run_id}: use a new one.",
            idempotency_key=run_input.request_id,
            run_id=run_id,
        )
    if reason == "full":
        return MainspringError(
            Reason.QUEUE_FULL,
            f"Run {run_id} has {limit} inputs of kind {kind} that it has not taken: wait until it has.",
            queue=f"{kind} inputs of the run",
            limit=limit,
        )
    return MainspringError(
        Reason.TRANSITION_ILLEGAL,
        f"Run {run_id} is {name}, or will be something else by then: {_EVENTS.get(kind, kind)} cannot come now.",
        run_id=run_id,
        state=name,
        event=_EVENTS.get(kind, kind),
    )


def refused_answer(
    approval_id: str, reason: str, *, decision: int, answered_by: str, expires_time: datetime | None, role: str
) -> MainspringError | None:
    """The same for what an approval alone is refused for; None: it is not that."""
    if reason == "role":
        return MainspringError(
            Reason.ROLE_REQUIRED,
            f"Approval {approval_id} needs the role {role}: ask somebody who has it.",
            method="PutInput",
            role=role,
        )
    if reason == "resolved":
        name = types_pb2.ApprovalDecision.Name(decision).removeprefix("APPROVAL_DECISION_")  # type: ignore[arg-type]  # a number of the row
        return MainspringError(
            Reason.APPROVAL_RESOLVED,
            f"Approval {approval_id} is decided already: {name}{f' by {answered_by}' if answered_by else ''}.",
            approval_id=approval_id,
            decision=name,
            by=answered_by,
        )
    if reason == "expired" and expires_time is not None:
        return MainspringError(
            Reason.APPROVAL_EXPIRED,
            f"The time for an answer to approval {approval_id} was over at {expires_time.isoformat()}.",
            approval_id=approval_id,
            expires_time=expires_time.isoformat(),
        )
    return None
