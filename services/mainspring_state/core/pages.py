"""Page tokens: where a page ended, as text that callers only hand back."""

from __future__ import annotations

import base64
import binascii
from typing import Final

from mainspring.v1 import types_pb2
from mainspring_kit.errors import MainspringError, Reason

from mainspring_state.core.creation import is_uuid

# Up to the year 9999.
_MICROSECONDS_MAX: Final = 253_402_300_799 * 1_000_000


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


def _invalid(token: str) -> MainspringError:
    return MainspringError(
        Reason.REQUEST_INVALID,
        f"The page token {token[:64]!r} is none of this list: begin again without one.",
        field="page_token",
    )
