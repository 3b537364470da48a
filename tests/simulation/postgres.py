"""What asyncpg is to the services, over the model: statements take time, connections break around a commit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any, Final

import asyncpg
from mainspring_kit import postgres

from tests.simulation.leasing import Schema
from tests.simulation.loop import SimLoop

# Any in this module: rows and arguments are what the statements say.
_NAMES: Final = {statement: name for name, statement in postgres.load_queries("mainspring_state").items()}
_SCALARS: Final = {"make_partitions"}


class Server:
    """The database server. A statement that was sent is carried out whatever becomes of its sender."""

    def __init__(self, schema: Schema, loop: SimLoop, rng: Random) -> None:
        self.schema = schema
        self.fault_share = 0.0
        self.on_statement: Callable[[], None] = lambda: None
        self._loop = loop
        self._rng = rng
        self._latency = rng.choice((0.0005, 0.003))
        # Its context is nobody's: no kill reaches it.
        self._context = asyncio.Handle(lambda: None, (), loop)._context  # type: ignore[attr-defined]  # a fresh copy

    async def execute(self, statement: str, arguments: tuple[Any, ...]) -> Any:
        """Carries a statement out and gives its rows; what may go wrong on the way does."""
        fault = self._rng.random() if self.fault_share else 1.0
        if fault < self.fault_share / 3:
            await asyncio.sleep(self._latency)
            raise asyncpg.DeadlockDetectedError("somebody else was there first")
        done: asyncio.Future[Any] = self._loop.create_future()
        delay = self._latency * (0.2 + self._rng.random())
        self._loop.call_later(delay, self._carry_out, statement, arguments, done, context=self._context)
        if fault < self.fault_share:
            await asyncio.sleep(delay * 2 * self._rng.random())
            raise asyncpg.ConnectionDoesNotExistError("the connection broke")
        return await done

    def _carry_out(self, statement: str, arguments: tuple[Any, ...], done: asyncio.Future[Any]) -> None:
        rows = getattr(self.schema, _NAMES[statement])(*arguments)
        self.on_statement()
        back = self._latency * (0.2 + self._rng.random())
        self._loop.call_later(back, _answer, done, rows, context=self._context)


def _answer(done: asyncio.Future[Any], rows: Any) -> None:
    if not done.done():
        done.set_result(rows)


class Connection:
    """A connection and a pool of them; also the prepared statement, as each of these only carries statements out."""

    def __init__(self, server: Server, statement: str = "") -> None:
        self._server = server
        self._statement = statement
        self._user: tuple[str, ...] = ()

    async def prepare(self, statement: str) -> Connection:
        """A statement of its own."""
        return Connection(self._server, statement)

    def terminate(self) -> None:
        """Nothing is held."""

    @asynccontextmanager
    async def acquire(self, *, timeout: float) -> AsyncIterator[Connection]:
        """A connection of the pool."""
        yield Connection(self._server)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """The block is one transaction."""
        yield

    async def execute(self, statement: str, *arguments: Any) -> None:
        """Carries out a statement; the one that says who the user is costs nothing here."""
        if statement in _NAMES:
            await self._server.execute(statement, arguments)
        else:
            self._user = arguments

    async def fetchrow(self, *arguments: Any) -> Any:
        """The one row, or None."""
        return await self._fetch(arguments)

    async def fetch(self, *arguments: Any) -> Any:
        """All rows."""
        return await self._fetch(arguments)

    async def fetchval(self, *arguments: Any) -> Any:
        """The one value."""
        return await self._fetch(arguments)

    async def _fetch(self, arguments: tuple[Any, ...]) -> Any:
        statement, *values = (self._statement, *arguments) if self._statement else arguments
        if self._user and tuple(values[:2]) != self._user:
            # Row-level security: whoever asks as another user sees nothing.
            return None
        return await self._server.execute(statement, tuple(values))
