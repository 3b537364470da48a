"""PostgreSQL and Valkey for tests that need no whole stack: real servers from wheels, on unix sockets."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import asyncpg
from mainspring.embedded import postgres, valkey
from mainspring.embedded.launch import Launch

from test_framework.loop_thread import LoopThread

READY_SECONDS_MAX = 120.0
STOP_SECONDS_MAX = 20.0

# Waits for the end of a pipe whose other end only the tests' process holds, then sends the signal to the server.
_GUARD = 'read -r _; kill -"$1" "$2"'


@dataclass(frozen=True, slots=True)
class Database:
    """A database of a test module's own. URLs are for asyncpg; `service_urls` has one per service that keeps tables."""

    name: str
    owner_url: str
    service_urls: Mapping[str, str] = field(default_factory=dict)


class PostgresServer:
    """A running server; makes and drops databases on it."""

    def __init__(self, socket_directory: Path) -> None:
        self._host = quote(str(socket_directory), safe="")

    def url(self, database: str, *, user: str = "postgres", password: str = "") -> str:
        """The URL of a database, as the given role; local connections are trusted."""
        return f"postgresql://{user}:{password}@/{database}?host={self._host}"

    async def create(self, prefix: str, *, template: str = "template1") -> str:
        """Makes a database and returns its name."""
        name = f"{prefix}_{secrets.token_hex(4)}"
        await self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return name

    async def drop(self, name: str) -> None:
        """Drops a database, whoever is connected."""
        await self._execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    async def _execute(self, statement: str) -> None:
        connection = await asyncpg.connect(self.url("postgres"))
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


@contextmanager
def embedded_postgres(directory: Path) -> Iterator[PostgresServer]:
    """PostgreSQL as `mainspring dev` runs it, data and socket in `directory`; stopped at the end."""
    data = directory / "postgres"
    _wait(postgres.initialize(data))
    with _running(postgres.launch(data, directory, log=directory / "postgres.log")):
        yield PostgresServer(directory)


@contextmanager
def embedded_valkey(directory: Path) -> Iterator[str]:
    """Valkey as `mainspring dev` runs it, its socket in `directory`; yields its URL."""
    socket = directory / "valkey.sock"
    with _running(valkey.launch(directory, socket, log=directory / "valkey.log")):
        yield valkey.url(socket)


@contextmanager
def _running(launch: Launch) -> Iterator[None]:
    """A server that lives as long as the block, and ends with this process however that ends."""
    with launch.log.open("ab") as log:
        server = subprocess.Popen(launch.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    guard = subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "guard", str(int(launch.stop_signal)), str(server.pid)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        _wait(launch.ready(server.pid))
        yield
    finally:
        guard.kill()
        guard.communicate()
        server.send_signal(launch.stop_signal)
        server.wait(STOP_SECONDS_MAX)


def _wait(awaitable: Awaitable[None]) -> None:
    """Waits for something asynchronous, whether or not a loop runs in this thread."""

    async def wait() -> None:
        await awaitable

    loop = LoopThread("embedded-servers")
    try:
        loop.run(wait(), READY_SECONDS_MAX)
    finally:
        loop.close()
