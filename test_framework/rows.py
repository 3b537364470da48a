"""Rows read back from PostgreSQL: as the owner, who sees everything, and as a service's role on behalf of a user."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from mainspring_kit.identity import UserExecutionContext

Row = Mapping[str, Any]  # Any: what the column holds

_CONNECT_SECONDS = 10.0


class Rows:
    """Reads and changes the stack's database. Each call is one connection, so nothing of it outlives the test."""

    def __init__(self, owner_url: str, service_urls: Mapping[str, str]) -> None:
        self._owner_url = owner_url
        self._service_urls = service_urls

    async def as_owner(self, statement: str, *values: object) -> list[Row]:
        """What the owner of all tables gets: row-level security does not hold for it."""
        async with _connection(self._owner_url) as connection:
            return [dict(row) for row in await connection.fetch(statement, *values)]

    async def execute(self, statement: str) -> None:
        """Carries out a change as the owner."""
        async with _connection(self._owner_url) as connection:
            await connection.execute(statement)

    async def as_service(
        self, service: str, context: UserExecutionContext | None, statement: str, *values: object
    ) -> list[Row]:
        """What the login role of `state` or `registry` gets on behalf of a user, or of nobody."""
        async with _connection(self._service_urls[service]) as connection, connection.transaction():
            if context is not None:
                await connection.execute(
                    "SELECT set_config('mainspring.tenant_id', $1, true), set_config('mainspring.user_id', $2, true)",
                    context.tenant_id,
                    context.user_id,
                )
            return [dict(row) for row in await connection.fetch(statement, *values)]

    async def runs(self, context: UserExecutionContext) -> list[Row]:
        """The rows of the user's runs in the order in which they were made."""
        return await self.as_owner(
            "SELECT * FROM state.runs WHERE tenant_id = $1 AND user_id = $2 ORDER BY create_time, run_id",
            context.tenant_id,
            context.user_id,
        )

    async def run(self, run_id: str) -> Row:
        """The one row of a run."""
        found = await self.as_owner("SELECT * FROM state.runs WHERE run_id = $1::text::uuid", run_id)
        assert len(found) == 1, f"run {run_id} has {len(found)} rows"
        return found[0]

    async def events(self, run_id: str) -> list[Row]:
        """The rows of a run's log, in order."""
        return await self.as_owner("SELECT * FROM state.events WHERE run_id = $1::text::uuid ORDER BY seq", run_id)


def holds(rows: Iterable[Row], text: str) -> bool:
    """Whether any column of any row holds the text, also within bytes."""
    return any(_holds(value, text) for row in rows for value in row.values())


def check_gapless(event_rows: Sequence[Row]) -> None:
    """Fails unless the seqs are 1, 2, 3 …"""
    seqs = [row["seq"] for row in event_rows]
    assert seqs and seqs == list(range(1, len(seqs) + 1)), seqs


def _holds(value: object, text: str) -> bool:
    return text.encode() in value if isinstance(value, bytes | memoryview) else text in str(value)


@asynccontextmanager
async def _connection(url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    connection = await asyncpg.connect(url, timeout=_CONNECT_SECONDS, command_timeout=_CONNECT_SECONDS)
    try:
        yield connection
    finally:
        await connection.close()
