"""PostgreSQL through asyncpg: pools, the user's context for row-level security, named queries, migrations."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

import asyncpg
from pogo_core.util import migrate as pogo

from mainspring_kit.errors import MainspringError, Reason

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]
    Pool = asyncpg.Pool[asyncpg.Record]

# The server ends a statement after 30 s, and with it its locks; then this process gives up waiting.
ANSWER_SECONDS_MAX: Final = 35.0
CONNECT_SECONDS_MAX: Final = 10.0
# What asyncpg raises when the server is away, going, coming, full, silent, or lets nobody in.
UNREACHABLE: Final = (
    OSError,  # and TimeoutError, which is one
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.TooManyConnectionsError,
    asyncpg.InternalClientError,
    asyncpg.InterfaceError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.ObjectNotInPrerequisiteStateError,
)

# What it raises when a statement was none the worse for coming at another moment: deadlocks, full disks.
_TRANSIENT: Final = (asyncpg.TransactionRollbackError, asyncpg.InsufficientResourcesError)

_LIMITS: Final = {"idle_in_transaction_session_timeout": "10s", "statement_timeout": "30s"}  # no lock is held for ever
_SETTINGS: Final = {"application_name": "mainspring", "jit": "off", "timezone": "UTC", **_LIMITS}
_MIGRATION_LOCK: Final = 7_236_480_151
_QUERY_HEADER: Final = re.compile(r"^-- (?P<name>[a-z_0-9]+): (?P<purpose>.+)$", re.MULTILINE)
_SET_USER: Final = "SELECT set_config('mainspring.tenant_id', $1, true), set_config('mainspring.user_id', $2, true)"


async def connect(url: str, *, size_max: int = 8, size_min: int = 1) -> Pool:
    """A pool of connections with bounded statements."""
    return await asyncpg.create_pool(
        url,
        min_size=size_min,
        max_size=size_max,
        timeout=CONNECT_SECONDS_MAX,
        command_timeout=ANSWER_SECONDS_MAX,
        server_settings=_SETTINGS,
    )


async def connect_one(url: str) -> asyncpg.Connection[asyncpg.Record]:
    """One connection of its owner's own."""
    return await asyncpg.connect(
        url, timeout=CONNECT_SECONDS_MAX, command_timeout=ANSWER_SECONDS_MAX, server_settings=_SETTINGS
    )


@contextmanager
def reachable() -> Iterator[None]:
    """Turns the server's absence within the block, and what passes by itself, into PEER_UNAVAILABLE."""
    try:
        yield
    except asyncpg.DataError:
        raise  # an InterfaceError too, but about a value: ours
    except (*UNREACHABLE, *_TRANSIENT) as error:
        raise MainspringError(
            Reason.PEER_UNAVAILABLE,
            f"PostgreSQL cannot be reached ({type(error).__name__}): try again soon.",
            peer="postgresql",
        ) from error


@asynccontextmanager
async def as_user(pool: Pool, tenant_id: str, *, user_id: str) -> AsyncIterator[Connection]:
    """A transaction in which row-level security shows what this user may see, and nothing else."""
    with reachable():
        async with pool.acquire(timeout=CONNECT_SECONDS_MAX) as connection, connection.transaction():
            await connection.execute(_SET_USER, tenant_id, user_id)
            yield connection


def load_queries(package: str) -> dict[str, str]:
    """The statements of `<package>/sql/queries.sql` by name. Each begins with a line `-- name: purpose`."""
    text = resources.files(package).joinpath("sql/queries.sql").read_text(encoding="utf-8")
    headers = list(_QUERY_HEADER.finditer(text))
    ends = [header.start() for header in headers[1:]] + [len(text)]
    queries = {header["name"]: text[header.end() : end].strip() for header, end in zip(headers, ends, strict=True)}
    if len(queries) != len(headers):
        raise ValueError(f"{package}/sql/queries.sql names a statement twice")
    return queries


async def migrate(owner_url: str, directory: Path, *, schema: str, role_url: str) -> None:
    """Brings a schema to its newest version, one process at a time, and lets the service's role log in.

    `role_url` is what the service connects with: its user must be the role that the migrations made; its password, if
    it has one, becomes the role's.
    """
    with reachable():
        connection = await connect_one(owner_url)
    try:
        await connection.execute("SELECT pg_advisory_lock($1)", _MIGRATION_LOCK)
        await pogo.apply(connection, directory, schema_name=schema)
        parts = urlsplit(role_url)
        if parts.username and parts.password:
            statement = await connection.fetchval(
                "SELECT format('ALTER ROLE %I LOGIN PASSWORD %L', $1::text, $2::text)",
                unquote(parts.username),
                unquote(parts.password),
            )
            await connection.execute(statement)
    finally:
        await connection.close()
