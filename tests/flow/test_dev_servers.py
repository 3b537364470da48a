"""The embedded servers: durable, bounded, quick to start, never on a port, and whole after a kill."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
import redis.asyncio
from mainspring.dev.child import Child
from mainspring.embedded import postgres, valkey
from mainspring.embedded.launch import StartError

from tests.flow.supervising import Record, supervised

SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_buffers": "256MB",
    "wal_buffers": "16MB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    "jit": "off",
    "max_connections": "100",
    "listen_addresses": "",
    "server_encoding": "UTF8",
}


@pytest.fixture(scope="module")
def made_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder as the first start makes it."""
    data = tmp_path_factory.mktemp("pg") / "postgres"
    asyncio.run(postgres.initialize(data))
    return data


@pytest.fixture
def data(made_folder: Path, tmp_path: Path) -> Path:
    """A copy of it for one test, with its owner."""
    copy = tmp_path / "postgres"
    shutil.copytree(made_folder, copy, symlinks=True)
    owner = made_folder.stat()
    for path in (copy, *copy.rglob("*")):
        shutil.chown(path, owner.st_uid, owner.st_gid)
    return copy


@asynccontextmanager
async def running_postgres(data: Path, sockets: Path) -> AsyncIterator[Child]:
    launch = postgres.launch(data, sockets, log=data.with_name("postgres.log"))
    async with supervised(launch, Record()) as child:
        await child.serving.wait()
        yield child


@pytest.fixture
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a path that is short enough for a socket."""
    return tmp_path_factory.mktemp("s")


async def test_postgres_is_durable_bounded_and_on_a_socket_only(data: Path, sockets: Path) -> None:
    started = time.monotonic()
    async with running_postgres(data, sockets):
        assert time.monotonic() - started < 10
        connection = await asyncpg.connect(postgres.url(sockets))
        found = {name: await connection.fetchval("SELECT current_setting($1)", name) for name in SETTINGS}
        assert found == SETTINGS
        assert await connection.fetchval("SELECT current_database()") == "mainspring"
        await connection.close()


async def test_what_was_committed_survives_a_kill_and_the_server_comes_back(data: Path, sockets: Path) -> None:
    async with running_postgres(data, sockets) as child:
        connection = await asyncpg.connect(postgres.url(sockets))
        await connection.execute("CREATE TABLE kept AS SELECT 42 AS value")
        await child.signal(signal.SIGKILL)
        connection.terminate()
        await asyncio.wait_for(child.serving.wait(), 20)
        connection = await asyncpg.connect(postgres.url(sockets))
        assert await connection.fetchval("SELECT value FROM kept") == 42
        await connection.close()


async def test_a_stop_with_open_connections_is_quick_and_clean(data: Path, sockets: Path) -> None:
    async with running_postgres(data, sockets) as child:
        connection = await asyncpg.connect(postgres.url(sockets))
        process = child.process
        assert process is not None
        await child.stop(seconds=10)
        assert process.returncode == 0
        connection.terminate()
    assert "received fast shutdown request" in data.with_name("postgres.log").read_text()


async def test_a_lock_file_left_by_a_killed_server_does_not_stop_the_next(
    made_folder: Path, data: Path, sockets: Path
) -> None:
    # Its pid is another's now, alive and of the server's own account, but no PostgreSQL.
    other = await asyncio.create_subprocess_exec("sleep", "60", user=_owner(made_folder))
    stale = (str(other.pid), str(data), "1700000000", "5432", str(sockets), "", "  1  1", "ready   ")
    (data / "postmaster.pid").write_text("\n".join(stale) + "\n")
    (sockets / ".s.PGSQL.5432.lock").write_text("\n".join(stale) + "\n")
    async with running_postgres(data, sockets) as child:
        assert postgres.running_pid(data) == child.pid
    other.kill()
    await other.wait()


def test_data_of_another_postgres_is_refused_and_named(data: Path) -> None:
    (data / "PG_VERSION").write_text("16\n")
    with pytest.raises(StartError, match=r"data of PostgreSQL 16; Mainspring brings PostgreSQL 18\..*pg_dump"):
        postgres.is_initialized(data)


async def test_a_half_made_data_folder_is_made_again(tmp_path: Path) -> None:
    half = tmp_path / "postgres.new"
    half.mkdir()
    (half / "PG_VERSION").write_text("18\n")
    data = tmp_path / "postgres"
    assert not postgres.is_initialized(data)
    await postgres.initialize(data)
    assert postgres.is_initialized(data)
    assert not half.exists()


async def test_valkey_is_bounded_keeps_nothing_and_comes_back_empty(tmp_path: Path, sockets: Path) -> None:
    socket = sockets / "valkey.sock"
    launch = valkey.launch(tmp_path, socket, log=tmp_path / "valkey.log")
    async with supervised(launch, Record()) as child:
        await child.serving.wait()
        client = redis.asyncio.Redis.from_url(valkey.url(socket), decode_responses=True)
        found = {
            **await client.config_get("maxmemory*"),
            **await client.config_get("save"),
            **await client.config_get("port"),
        }
        assert found["maxmemory"] == str(256 << 20)
        assert found["maxmemory-policy"] == "volatile-ttl"
        assert (found["save"], found["port"]) == ("", "0")
        await client.set("key", "value")
        await client.aclose()
        await child.signal(signal.SIGKILL)
        await asyncio.wait_for(child.serving.wait(), 10)
        client = redis.asyncio.Redis.from_url(valkey.url(socket))
        assert await client.dbsize() == 0
        await client.aclose()
    assert sorted(os.listdir(tmp_path)) == ["valkey.log"]  # noqa: PTH208  # what is left, by name


def _owner(path: Path) -> int:
    return path.stat().st_uid
