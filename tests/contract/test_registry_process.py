"""The registry as processes: two on one database, one that stops, loses its database, or cannot start."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mainspring.v1 import registry_pb2 as pb
from mainspring.v1 import registry_pb2_grpc as rpc

from test_framework.grpc_testing import error_of, free_address
from test_framework.identities import Identities, unique
from test_framework.servers import PostgresServer
from test_framework.waiting import wait_until
from tests.contract.registry_calls import TIMEOUT, agent

pytestmark = pytest.mark.contract
grpc_service = "Registry"

SERVING = int(health_pb2.HealthCheckResponse.SERVING)
NOT_SERVING = int(health_pb2.HealthCheckResponse.NOT_SERVING)
START_SECONDS = 20
STOP_SECONDS = 15

# Any in this module: generated stubs have no common base, asyncpg's connections are generic for checkers only.


@dataclass
class Started:
    """A registry process that serves."""

    child: asyncio.subprocess.Process
    stub: Any
    readiness: Callable[[], Awaitable[int]]

    async def stop(self) -> int:
        """Asks it to stop and waits for its exit code."""
        self.child.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.child.wait(), STOP_SECONDS)


@asynccontextmanager
async def started(database_url: str, identities: Identities) -> AsyncIterator[Started]:
    """A registry process of the test's own; killed at the end if it still runs."""
    address = free_address()
    environment = {
        **os.environ,
        "MAINSPRING_LISTEN": address,
        "MAINSPRING_DATABASE_URL": database_url,
        "MAINSPRING_AUTH_SECRET": identities.auth_secret,
        "MAINSPRING_SERVICE_SECRET": identities.service_secret,
        "MAINSPRING_ENVIRONMENT": "development",
        "MAINSPRING_DRAIN_SECONDS": "5",
    }
    child = await asyncio.create_subprocess_exec(sys.executable, "-m", "mainspring_registry", env=environment)
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)

            async def readiness() -> int:
                try:
                    answer = await health.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=2)
                except grpc.aio.AioRpcError:
                    return 0
                return int(answer.status)

            async def is_ready() -> bool:
                assert child.returncode is None, "the process ended instead of starting"
                return await readiness() == SERVING

            await wait_until(is_ready, START_SECONDS, what="the registry is ready")
            yield Started(child, rpc.RegistryServiceStub(channel), readiness)
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


@pytest.fixture
async def database(contract_postgres: PostgresServer, contract_templates: Any) -> AsyncIterator[tuple[str, str]]:
    """A migrated database of the test's own: its name, and its URL as the service's role."""
    template = await asyncio.to_thread(contract_templates, ("Registry",))
    name = await contract_postgres.create("registry", template=template)
    yield name, contract_postgres.url(name, user="mainspring_registry", password="registry-password")
    await contract_postgres.drop(name)


async def test_a_change_through_one_process_is_seen_at_another_within_a_second(
    database: tuple[str, str], identities: Identities
) -> None:
    _, url = database
    metadata = identities.metadata(unique("tenant"), "ann", "operator")
    async with started(url, identities) as one, started(url, identities) as other:
        watch = one.stub.WatchCatalog(pb.WatchCatalogRequest(), metadata=identities.service_metadata(), timeout=60)
        empty = await watch.read()
        assert empty == pb.WatchCatalogResponse(revision=1), "an empty catalog is complete at revision 1"
        await other.stub.RegisterAgent(agent("lookup"), metadata=metadata, timeout=TIMEOUT)
        start = time.monotonic()
        while not (frame := await watch.read()).agents:
            assert frame.revision == 1
        assert time.monotonic() - start < 1.0
        assert frame.agents[0].agent.name == "lookup"
        again = await one.stub.RegisterAgent(agent("lookup"), metadata=metadata, timeout=TIMEOUT)
        assert not again.created


async def test_a_process_that_stops_sends_its_watchers_away_at_once(
    database: tuple[str, str], identities: Identities
) -> None:
    _, url = database
    async with started(url, identities) as process:
        watch = process.stub.WatchCatalog(pb.WatchCatalogRequest(), metadata=identities.service_metadata(), timeout=60)
        await watch.read()
        start = time.monotonic()
        assert await process.stop() == 0
        assert time.monotonic() - start < 4.0, "it waited for the drain time instead of ending the streams"
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            while await watch.read() is not grpc.aio.EOF:
                pass
        assert error_of(raised.value)[:2] == (grpc.StatusCode.UNAVAILABLE, "DRAINING")


async def test_without_its_database_a_process_says_so_and_recovers(
    database: tuple[str, str], identities: Identities, contract_postgres: PostgresServer
) -> None:
    name, url = database
    metadata = identities.metadata(unique("tenant"), "ann", "operator")
    owner: Any = await asyncpg.connect(contract_postgres.url("postgres"))
    try:
        async with started(url, identities) as process:
            await process.stub.RegisterAgent(agent("lookup"), metadata=metadata, timeout=TIMEOUT)
            watch = process.stub.WatchCatalog(pb.WatchCatalogRequest(), metadata=identities.service_metadata())
            await watch.read()
            await owner.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
            await owner.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1", name)

            async def is_unready() -> bool:
                return await process.readiness() == NOT_SERVING

            await wait_until(is_unready, what="the readiness goes")
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await process.stub.GetAgent(pb.GetAgentRequest(name="lookup"), metadata=metadata, timeout=TIMEOUT)
            expected = (grpc.StatusCode.UNAVAILABLE, "PEER_UNAVAILABLE", {"peer": "postgresql"})
            assert error_of(raised.value) == expected
            await _until_silent(watch)
            await owner.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')

            async def is_ready() -> bool:
                return await process.readiness() == SERVING

            await wait_until(is_ready, what="the readiness comes back")
            read = await process.stub.GetAgent(pb.GetAgentRequest(name="lookup"), metadata=metadata, timeout=TIMEOUT)
            assert read.agent.version == "1"
            request = pb.WatchCatalogRequest()
            again = process.stub.WatchCatalog(request, metadata=identities.service_metadata(), timeout=60)
            assert (await asyncio.wait_for(again.read(), 5)).agents
            assert await process.stop() == 0
    finally:
        await owner.close()


async def _until_silent(watch: Any) -> None:
    """Until no beat has come for a second: what tells a watcher that its copy may be stale."""
    read = asyncio.ensure_future(watch.read())
    try:
        while True:
            done, _ = await asyncio.wait({read}, timeout=1.0)
            if not done:
                return
            assert read.result() is not grpc.aio.EOF
            read = asyncio.ensure_future(watch.read())
    finally:
        read.cancel()


NEEDED_TO_SERVE = {"LISTEN", "DATABASE_URL", "AUTH_SECRET", "SERVICE_SECRET"}


@pytest.mark.parametrize(
    ("command", "needed"),
    [([], NEEDED_TO_SERVE), (["serve"], NEEDED_TO_SERVE), (["migrate"], {"DATABASE_URL", "OWNER_DATABASE_URL"})],
)
async def test_wrong_settings_are_all_told_and_exit_with_two(command: list[str], needed: set[str]) -> None:
    environment = {"MAINSPRING_LISTEN": "nowhere", "MAINSPRING_DATABASE_URL": "mysql://here"}
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "mainspring_registry", *command, env=environment, stderr=asyncio.subprocess.PIPE
    )
    _, text = await asyncio.wait_for(child.communicate(), START_SECONDS)
    assert child.returncode == 2
    assert set(re.findall(r"^  MAINSPRING_(\w+)", text.decode(), re.MULTILINE)) == needed


async def test_a_migration_without_a_database_says_so_in_one_line() -> None:
    environment = {
        "MAINSPRING_DATABASE_URL": "postgresql://mainspring_registry:secret-one@127.0.0.1:9/x",
        "MAINSPRING_OWNER_DATABASE_URL": "postgresql://owner:secret-two@127.0.0.1:9/x",
    }
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "mainspring_registry", "migrate", env=environment, stderr=asyncio.subprocess.PIPE
    )
    _, text = await asyncio.wait_for(child.communicate(), START_SECONDS)
    assert child.returncode == 1
    assert "PostgreSQL cannot be reached (ConnectionRefusedError)" in text.decode()
    assert "Traceback" not in text.decode()
    assert "secret-" not in text.decode()


async def test_help_names_the_commands() -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "mainspring_registry", "--help", stdout=asyncio.subprocess.PIPE
    )
    text, _ = await asyncio.wait_for(child.communicate(), START_SECONDS)
    assert child.returncode == 0
    assert "serve" in text.decode()
    assert "migrate" in text.decode()
