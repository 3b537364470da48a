"""What the owner of the servers can do to them: triggers, limits and lost connections in PostgreSQL and in Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import redis.asyncio

ROLES: Final = ("mainspring_state", "mainspring_registry")
SLOW_SHARE: Final = 0.004
SLOW_SECONDS: Final = 0.25
REACH_SECONDS: Final = 30.0
CLIENTS_MAX: Final = 10_000

_RETRY_SECONDS: Final = 0.05
# All but the owner's own connection, which is to another database.
_TERMINATE: Final = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = ANY ($1)"
# What a trigger does with an insert into the log. Refusals are of three kinds: a number, a text, a constraint.
_SLOW: Final = f"IF random() < {SLOW_SHARE} THEN PERFORM pg_sleep({SLOW_SECONDS}); END IF;"
_FULL: Final = "RAISE EXCEPTION 'no space left on the drill''s device' USING ERRCODE = '53100';"
_VALUE: Final = """
IF position(convert_to('refuse-' || NEW.type, 'UTF8') IN NEW.event) > 0 THEN
  RAISE EXCEPTION 'this value is refused in the drill' USING ERRCODE =
    (ARRAY['22003', '22P05', '23514'])[1 + abs(hashtext(NEW.run_id::text)) % 3];
END IF;"""
TRIGGERS: Final = {"slow": _SLOW, "full": _FULL, "value": _VALUE}


class Database:
    """PostgreSQL as its owner, on a connection for each deed: the server may have died since the last one."""

    def __init__(self, owner_url: str) -> None:
        self._url = owner_url
        self._name = urlsplit(owner_url).path.lstrip("/")
        # From here the drill's database may be closed and opened again.
        self._side_url = urlunsplit(urlsplit(owner_url)._replace(path="/postgres"))

    @asynccontextmanager
    async def trigger(self, kind: str) -> AsyncIterator[None]:
        """Every insert into the log meets a trigger of this kind while the block runs."""
        await self._execute(
            f"CREATE OR REPLACE FUNCTION public.drill() RETURNS trigger LANGUAGE plpgsql AS $body$ "
            f"BEGIN {TRIGGERS[kind]} RETURN NEW; END $body$",
            "CREATE TRIGGER drill BEFORE INSERT ON state.events FOR EACH ROW EXECUTE FUNCTION public.drill()",
        )
        try:
            yield
        finally:
            await self._execute("DROP TRIGGER drill ON state.events", "DROP FUNCTION public.drill()")

    async def terminate(self) -> None:
        """Ends every connection of the services."""
        async with self._connected(self._side_url) as connection:
            await connection.execute(_TERMINATE, list(ROLES))

    @asynccontextmanager
    async def refusing(self, how: str) -> AsyncIterator[None]:
        """No service is let in while the block runs: `role`, each is at its limit; `database`, it is closed."""
        if how == "role":
            close = [f"ALTER ROLE {role} CONNECTION LIMIT 0" for role in ROLES]
            reopen = [f"ALTER ROLE {role} CONNECTION LIMIT -1" for role in ROLES]
        else:
            close = [f"ALTER DATABASE {self._name} ALLOW_CONNECTIONS false"]
            reopen = [f"ALTER DATABASE {self._name} ALLOW_CONNECTIONS true"]
        await self._execute(*close, url=self._side_url)
        try:
            await self.terminate()
            yield
        finally:
            await self._execute(*reopen, url=self._side_url)

    async def _execute(self, *statements: str, url: str = "") -> None:
        """Each by itself, so that a lock is held no longer than it must be."""
        async with self._connected(url or self._url) as connection:
            for statement in statements:
                while True:
                    try:
                        await connection.execute(statement)
                        break
                    except asyncpg.DeadlockDetectedError:
                        # With an insert that goes the other way round over the log's partitions.
                        await asyncio.sleep(_RETRY_SECONDS)

    @asynccontextmanager
    async def _connected(self, url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        async with asyncio.timeout(REACH_SECONDS):
            while True:
                try:
                    connection = await asyncpg.connect(url)
                    break
                except (OSError, asyncpg.PostgresError):
                    await asyncio.sleep(_RETRY_SECONDS)
        try:
            yield connection
        finally:
            connection.terminate()


class Cache:
    """Redis or Valkey as its owner."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def terminate(self) -> None:
        """Ends every connection but this one."""
        async with self._connected() as client:
            await _kill(client)

    @asynccontextmanager
    async def refusing(self) -> AsyncIterator[None]:
        """Nobody else is let in while the block runs."""
        async with self._connected() as client:
            await client.config_set("maxclients", 1)
            try:
                await _kill(client)
                yield
            finally:
                await client.config_set("maxclients", CLIENTS_MAX)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[redis.asyncio.Redis]:
        client = redis.asyncio.Redis.from_url(self._url, single_connection_client=True)
        try:
            yield client
        finally:
            await client.aclose()


async def _kill(client: redis.asyncio.Redis) -> None:
    for kind in ("normal", "pubsub"):
        await client.client_kill_filter(_type=kind, skipme=True)
