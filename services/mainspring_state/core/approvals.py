"""What is right about approvals: their ids, the events that record them, and who may answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mainspring.v1 import events_pb2, state_pb2, types_pb2

from mainspring_state.core.creation import is_moment, is_uuid
from mainspring_state.core.refusals import invalid

TITLE_CHARACTERS_MAX: Final = 1_000
CALL_ID_CHARACTERS_MAX: Final = 128
# From the least on; a person's own approvals need `runner` where they name nothing else.
ROLES: Final = ("runner", "operator", "admin")

_DECISIONS: Final = frozenset(types_pb2.ApprovalDecision.values())
_SEQ_DIGITS_MAX: Final = 18


def read_id(approval_id: str) -> tuple[str, int] | None:
    """The run and the seq that an id names; None: it is no approval's."""
    run_id, _, seq = approval_id.partition(".")
    is_seq = seq.isascii() and seq.isdecimal() and len(seq) <= _SEQ_DIGITS_MAX and str(int(seq)) == seq
    return (run_id.lower(), int(seq)) if is_uuid(run_id.lower()) and is_seq else None


def answerable_roles(roles: Sequence[str]) -> list[str]:
    """The approvals of others that somebody with these roles may answer, by the role that they ask for."""
    ranks = [ROLES.index(role) for role in roles if role in ROLES]
    return list(ROLES[1 : max(ranks, default=0) + 1])


def check_request(append: state_pb2.Append, event: events_pb2.RunEvent) -> None:
    """Refuses an approval_requested that no row can hold or nobody could answer."""
    asked = event.approval_requested
    if asked.approval_id != f"{event.run_id}.{event.seq}":
        raise invalid(append, "approval_requested.approval_id", detail="it is <run_id>.<seq> of its event")
    if asked.role not in ("", *ROLES):
        raise invalid(append, "approval_requested.role", detail=f"it is one of {', '.join(ROLES)}")
    if len(asked.title) > TITLE_CHARACTERS_MAX or "\x00" in asked.title:
        raise invalid(
            append, "approval_requested.title", detail=f"it has at most {TITLE_CHARACTERS_MAX} characters, none NUL"
        )
    if len(asked.call_id) > CALL_ID_CHARACTERS_MAX or "\x00" in asked.call_id:
        raise invalid(append, "approval_requested.call_id", detail="it is too long, or holds a NUL character")
    if not is_moment(asked.expires_time):
        raise invalid(append, "approval_requested.expires_time", detail="it is before 1970 or after 9999")


def check_resolution(append: state_pb2.Append, event: events_pb2.RunEvent) -> None:
    """Refuses an approval_resolved of another run's approval, or one that decides nothing."""
    resolved = event.approval_resolved
    known = read_id(resolved.approval_id)
    if known is None or known[0] != event.run_id:
        raise invalid(append, "approval_resolved.approval_id", detail="it is none of this run's")
    if resolved.decision not in _DECISIONS or not resolved.decision:
        raise invalid(append, "approval_resolved.decision", detail="it says nothing that this release knows")
    if "\x00" in resolved.by:
        raise invalid(append, "approval_resolved.by", detail="it holds a NUL character")
