"""Which servers the tests' stack stands on, and that nothing of anybody else's is touched on them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import psutil
import pytest
import redis.asyncio

from test_framework.fixtures import real_services
from test_framework.loop_thread import LoopThread
from test_framework.servers import embedded_postgres, embedded_valkey
from test_framework.waiting import wait_until_blocking

pytestmark = pytest.mark.flow

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path short enough for a unix socket."""
    with tempfile.TemporaryDirectory(prefix="msf-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    """A loop for what runs outside the test's own."""
    thread = LoopThread("test-real-services")
    yield thread
    thread.close()


def test_named_servers_are_taken_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:secret@db.example:5000/mine")
    monkeypatch.setenv("REDIS_URL", "redis://cache.example:7000")
    servers = real_services.choose_servers()
    assert servers.database_url == os.environ["DATABASE_URL"]
    assert servers.redis_url == os.environ["REDIS_URL"]
    assert "db.example:5000" in servers.told and "cache.example:7000" in servers.told
    assert "secret" not in servers.told


def test_one_named_server_leaves_the_other_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://db.example:5000/mine")
    monkeypatch.delenv("REDIS_URL", raising=False)
    assert real_services.choose_servers().redis_url == ""
    assert "Redis: embedded" in real_services.choose_servers().told


def test_docker_can_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATABASE_URL", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(real_services.NO_DOCKER, "1")
    servers = real_services.choose_servers()
    assert (servers.database_url, servers.redis_url) == ("", "")
    assert "forbidden" in servers.told


async def test_a_redis_with_keys_of_others_is_refused_and_left_alone(folder: Path) -> None:
    with embedded_valkey(folder) as url:
        async with redis.asyncio.Redis.from_url(url) as client:
            await client.set("somebody-elses", "treasure")
            with pytest.raises(AssertionError, match="holds 1 keys that the tests did not make"):
                await real_services.claim_redis(url)
            assert await client.get("somebody-elses") == b"treasure"


async def test_leftovers_of_the_suite_itself_are_emptied(folder: Path) -> None:
    with embedded_valkey(folder) as url:
        async with redis.asyncio.Redis.from_url(url) as client:
            await real_services.claim_redis(url)
            await client.set("left-by-a-killed-session", "1")
            await real_services.claim_redis(url)
            assert await client.keys() == [real_services.MARKER_KEY.encode()]
            assert await client.ttl(real_services.MARKER_KEY) > 0
            await real_services.empty_redis(url)
            assert await client.dbsize() == 0


def test_workers_take_different_redis_databases(
    folder: Path, loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    with embedded_valkey(folder) as url:
        seen = []
        for worker in ("gw0", "gw1"):
            monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
            with real_services.own_redis(loop, url.replace("db=0", "db=3")) as own:
                seen.append(own)
        monkeypatch.delenv("PYTEST_XDIST_WORKER")
        with real_services.own_redis(loop, url.replace("db=0", "db=3")) as own:
            seen.append(own)
    assert len(set(seen)) == 3 and all(own.startswith("unix:///") for own in seen), seen


def test_a_database_is_made_on_the_named_server_and_dropped(folder: Path, loop: LoopThread) -> None:
    with embedded_postgres(folder) as server:
        url = server.url("postgres")
        with real_services.own_database(loop, url) as own:
            name = urlsplit(own).path.removeprefix("/")
            assert name.startswith("mainspring_test_")
            assert asyncio.run(_value(own, "SELECT current_database()")) == name
        assert asyncio.run(_value(url, f"SELECT count(*) FROM pg_database WHERE datname = '{name}'")) == 0


def test_embedded_servers_end_with_a_killed_test_process(folder: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from test_framework.servers import *\n"
        "with embedded_postgres(Path(sys.argv[1])), embedded_valkey(Path(sys.argv[1])):\n"
        "    print('up', flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with owner:
        assert owner.stdout is not None and owner.stdout.readline() == b"up\n"
        assert len(servers_in(folder)) == 2
        owner.kill()
    wait_until_blocking(lambda: not servers_in(folder), what="the end of both servers")


def servers_in(folder: Path) -> list[int]:
    """The servers that run on sockets in the folder: their main processes."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if str(folder) in words and ("/bin/postgres -D" in words or "/valkey-server " in words):
            found.append(process.info["pid"])
    return found


async def _value(url: str, statement: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()
