"""Page tokens: where a page ended, as text that callers only hand back."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from mainspring.v1 import types_pb2
from mainspring_kit.errors import MainspringError, Reason

from mainspring_state.core.approvals import read_id
from mainspring_state.core.creation import is_uuid

# Up to the year 9999.
_MICROSECONDS_MAX: Final = 253_402_300_799 * 1_000_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def read_run_token(token: str) -> str:
    """The run after which the next page begins; empty: the first page. REQUEST_INVALID."""
    if token and not is_uuid(token):
        raise _invalid(token)
    return token


def session_token(session: types_pb2.Session) -> str:
    """The token behind a session."""
    microseconds = session.create_time.ToMicroseconds()
    return base64.urlsafe_b64encode(f"{microseconds}:{session.session_id}".encode()).decode()


def read_session_token(token: str) -> tuple[int, str]:
    """The create time in microseconds and the id of the session before the next page. REQUEST_INVALID."""
    try:
        microseconds, _, session_id = base64.urlsafe_b64decode(token.encode()).decode().partition(":")
        position = int(microseconds)
        # What is outside of all calendars is no session's.
        if not 0 <= position <= _MICROSECONDS_MAX:
            raise _invalid(token)
        return position, session_id
    except (binascii.Error, ValueError) as error:
        raise _invalid(token) from error


@dataclass(frozen=True, slots=True)
class ApprovalMark:
    """Where a page of approvals ended."""

    create_time: datetime
    run_id: str
    seq: int


FIRST_APPROVALS: Final = ApprovalMark(datetime(9999, 1, 1, tzinfo=UTC), "ffffffff-ffff-ffff-ffff-ffffffffffff", 0)


def approval_token(approval: types_pb2.Approval) -> str:
    """The token behind an approval."""
    return f"{approval.create_time.ToMicroseconds()}.{approval.approval_id}"


def read_approval_token(token: str) -> ApprovalMark:
    """Where the next page begins; empty: the first one. REQUEST_INVALID."""
    if not token:
        return FIRST_APPROVALS
    microseconds, _, approval_id = token.partition(".")
    known = read_id(approval_id)
    is_number = microseconds.isascii() and microseconds.isdecimal() and len(microseconds) < 18
    if known is None or not is_number or int(microseconds) > _MICROSECONDS_MAX:
        raise _invalid(token)
    return ApprovalMark(_EPOCH + timedelta(microseconds=int(microseconds)), *known)


def first_run_id(since: Timestamp) -> str:
    """The least run id of a run that was made from then on: they begin with 48 bits of milliseconds."""
    milliseconds = min(max(since.seconds * 1_000 + since.nanos // 1_000_000, 0), (1 << 48) - 1)
    digits = f"{milliseconds:012x}"
    return f"{digits[:8]}-{digits[8:]}-0000-0000-000000000000"


def _invalid(token: str) -> MainspringError:
    return MainspringError(
        Reason.REQUEST_INVALID,
        f"The page token {token[:64]!r} is none of this list: begin again without one.",
        field="page_token",
    )
