"""What a user may read and make: every method is one transaction under row-level security as that user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from mainspring.v1 import types_pb2
from mainspring_kit import postgres
from mainspring_kit.identity import UserExecutionContext

from mainspring_state.core.creation import is_uuid
from mainspring_state.store.rows import as_user, to_run, to_session

_SQL: Final = postgres.load_queries("mainspring_state")
_STATES: Final = frozenset(types_pb2.RunState.values())
_LAST_RUN_ID: Final = "ffffffff-ffff-ffff-ffff-ffffffffffff"


@dataclass(frozen=True, slots=True)
class RunFilter:
    """Which runs a list shows; empty: all."""

    session_id: str = ""
    agent: str = ""
    states: Sequence[int] = ()
    parent_run_id: str = ""


@dataclass(frozen=True, slots=True)
class SessionMark:
    """Where a page of sessions ended."""

    create_time: datetime
    session_id: str


FIRST_SESSIONS: Final = SessionMark(datetime(9999, 1, 1, tzinfo=UTC), "")


class Reads:
    """The user's own runs, events and sessions."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def get_run(self, user: UserExecutionContext, run_id: str) -> types_pb2.Run | None:
        """The run, or None when the user has none of this id."""
        run_id = run_id.lower()
        if not is_uuid(run_id):
            return None
        async with as_user(self._pool, user) as connection:
            row = await connection.fetchrow(_SQL["get_run"], user.tenant_id, user.user_id, run_id)
        return None if row is None else to_run(row)

    async def list_runs(
        self, user: UserExecutionContext, wanted: RunFilter, *, before_run_id: str, page_size: int
    ) -> list[types_pb2.Run]:
        """Runs older than the one given (empty: all), newest first."""
        arguments = [
            user.tenant_id,
            user.user_id,
            before_run_id or _LAST_RUN_ID,
            wanted.agent,
            [state if state in _STATES else 0 for state in wanted.states],
            page_size,
        ]
        statement = _SQL["list_runs"]
        if wanted.parent_run_id:
            parent_run_id = wanted.parent_run_id.lower()
            if not is_uuid(parent_run_id):
                return []
            statement = _SQL["list_sub_runs"]
            arguments.append(parent_run_id)
        elif wanted.session_id:
            statement = _SQL["list_runs_of_session"]
            arguments.append(wanted.session_id)
        async with as_user(self._pool, user) as connection:
            return [to_run(row) for row in await connection.fetch(statement, *arguments)]

    async def read_events(
        self, user: UserExecutionContext, run_id: str, *, after_seq: int, item_max: int, byte_max: int
    ) -> list[bytes]:
        """A page of the log; it ends with the event that reaches the byte bound."""
        async with as_user(self._pool, user) as connection:
            rows = await connection.fetch(
                _SQL["read_events"], user.tenant_id, user.user_id, run_id, after_seq, item_max, byte_max
            )
        return [row["event"] for row in rows]

    async def create_session(
        self, user: UserExecutionContext, session_id: str, *, policy: int, title: str
    ) -> tuple[types_pb2.Session, bool]:
        """Makes a session; that and True, or the one of this id that was there, and whether this request made it."""
        async with as_user(self._pool, user) as connection:
            row = await connection.fetchrow(
                _SQL["create_session"], user.tenant_id, user.user_id, session_id, policy, title, user.request_id
            )
            if row is not None:
                return to_session(row), True
            row = await connection.fetchrow(_SQL["get_session"], user.tenant_id, user.user_id, session_id)
        assert row is not None, "sessions are not deleted yet"
        return to_session(row), bool(user.request_id) and row["request_id"] == user.request_id

    async def get_session(self, user: UserExecutionContext, session_id: str) -> types_pb2.Session | None:
        """The session, or None when the user has none of this id."""
        async with as_user(self._pool, user) as connection:
            row = await connection.fetchrow(_SQL["get_session"], user.tenant_id, user.user_id, session_id)
        return None if row is None else to_session(row)

    async def list_sessions(
        self, user: UserExecutionContext, *, before: SessionMark, page_size: int
    ) -> list[types_pb2.Session]:
        """Sessions older than the mark, newest first."""
        async with as_user(self._pool, user) as connection:
            rows = await connection.fetch(
                _SQL["list_sessions"],
                user.tenant_id,
                user.user_id,
                before.create_time,
                before.session_id,
                page_size,
            )
        return [to_session(row) for row in rows]
