"""WatchCatalog over the wire: the first copy, changes as they are made, beats; and that nothing is ever missed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import grpc
import pytest
from mainspring.v1 import registry_pb2 as pb

from test_framework.grpc_testing import error_of
from test_framework.identities import Identities, Metadata, unique
from test_framework.waiting import wait_until
from tests.contract.registry_calls import TIMEOUT, Wiring, agent, register_tool, tool, until_blocked, wiring

pytestmark = pytest.mark.contract
grpc_service = "Registry"

WATCHERS_MAX = 4
FRAME_SECONDS_MAX = 5.0

# Any in this module: generated stubs have no common base, asyncpg's connections are generic for checkers only.


@pytest.fixture(scope="module")
def grpc_wiring(contract_environment: dict[str, Any]) -> Wiring:
    """The registry's own, with few watchers."""
    return wiring({**contract_environment, "watchers_max": WATCHERS_MAX})


@pytest.fixture
def operator(identities: Identities) -> Metadata:
    """An operator of a tenant of the test's own."""
    return identities.metadata(unique("tenant"), "ann", "operator")


@pytest.fixture
async def owner(contract_environment: dict[str, Any]) -> AsyncIterator[Any]:
    """A connection as the database's owner."""
    connection = await asyncpg.connect(contract_environment["owner_database_url"])
    yield connection
    await connection.close()


class Copy:
    """What a watcher has gathered: the catalog's copy, and the frames it came in."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.frames: list[pb.WatchCatalogResponse] = []
        self.agents: dict[tuple[str, str, str], pb.CatalogAgent] = {}
        self.tools: dict[tuple[str, str], pb.CatalogTool] = {}
        self.revision = 0

    async def read(self) -> pb.WatchCatalogResponse:
        """Takes the next frame."""
        frame = await asyncio.wait_for(self._call.read(), FRAME_SECONDS_MAX)
        assert isinstance(frame, pb.WatchCatalogResponse), await self._call.code()
        assert len(frame.agents) <= 256
        assert len(frame.tools) <= 256
        self.frames.append(frame)
        self.agents |= {(each.tenant_id, each.agent.name, each.agent.version): each for each in frame.agents}
        self.tools |= {(each.tenant_id, each.tool.name): each for each in frame.tools}
        assert frame.revision == 0 or frame.revision >= self.revision
        self.revision = frame.revision
        return frame

    async def complete(self) -> None:
        """Takes frames until the first copy is complete."""
        while (await self.read()).revision == 0:
            pass

    async def until_agent(self, name: str) -> pb.CatalogAgent:
        """Takes frames until the agent is there."""
        while True:
            for (_, known, _), each in self.agents.items():
                if known == name:
                    return each
            await self.read()

    async def until_tool(self, name: str, description: str) -> pb.CatalogTool:
        """Takes frames until the tool is described so."""
        while True:
            for (_, known), each in self.tools.items():
                if known == name and each.tool.description == description:
                    return each
            await self.read()


@asynccontextmanager
async def watching(stub: Any, identities: Identities, after_revision: int = 0) -> AsyncIterator[Copy]:
    """A watcher; its stream is cancelled at the end."""
    request = pb.WatchCatalogRequest(after_revision=after_revision)
    call = stub.WatchCatalog(request, metadata=identities.service_metadata(), timeout=60)
    try:
        yield Copy(call)
    finally:
        call.cancel()


async def register(stub: Any, metadata: Metadata, name: str, **changes: object) -> pb.RegisterAgentResponse:
    response = await stub.RegisterAgent(agent(name, **changes), metadata=metadata, timeout=TIMEOUT)
    assert isinstance(response, pb.RegisterAgentResponse)
    return response


async def test_the_first_copy_holds_all_versions_and_tools_of_all_tenants(
    aio_stub: Any, identities: Identities
) -> None:
    tenants = [unique("tenant"), unique("tenant")]
    for tenant_id in tenants:
        metadata = identities.metadata(tenant_id, "ann", "operator")
        await register(aio_stub, metadata, "lookup", description="One.")
        await register(aio_stub, metadata, "lookup", description="Two.")
        await register_tool(aio_stub, metadata, tool("own", tenant_id))
    shared = unique("shared")
    await register_tool(aio_stub, identities.service_metadata(), tool(shared))
    async with watching(aio_stub, identities) as copy:
        await copy.complete()
    for tenant_id in tenants:
        descriptions = [copy.agents[tenant_id, "lookup", version].agent.description for version in ("1", "2")]
        assert descriptions == ["One.", "Two."]
        assert copy.agents[tenant_id, "lookup", "2"].agent.spec
        assert copy.tools[tenant_id, "own"].tool.description == tenant_id
    assert copy.tools["", shared].tool.shared
    assert all(frame.revision == 0 for frame in copy.frames[:-1])


async def test_changes_come_as_they_are_made(aio_stub: Any, identities: Identities, operator: Metadata) -> None:
    name = unique("live")
    async with watching(aio_stub, identities) as copy:
        await copy.complete()
        before = copy.revision
        registered = await register(aio_stub, operator, name)
        start = time.monotonic()
        seen = await copy.until_agent(name)
        assert time.monotonic() - start < 1.0
        assert seen.agent == registered.agent
        assert copy.revision > before
        await register_tool(aio_stub, operator, tool(name, "One."))
        await copy.until_tool(name, "One.")
        await register_tool(aio_stub, operator, tool(name, "Two."))
        await copy.until_tool(name, "Two.")


async def test_beats_tell_that_there_is_no_change(aio_stub: Any, identities: Identities) -> None:
    async with watching(aio_stub, identities) as copy:
        await copy.complete()
        start, revision = time.monotonic(), copy.revision
        for _ in range(8):
            beat = await copy.read()
            assert beat == pb.WatchCatalogResponse(revision=revision)
        assert time.monotonic() - start < 8 * 2.5


async def test_a_watcher_resumes_after_the_revision_it_has_seen(
    aio_stub: Any, identities: Identities, operator: Metadata
) -> None:
    old, new = unique("old"), unique("new")
    await register(aio_stub, operator, old)
    async with watching(aio_stub, identities) as first:
        await first.complete()
    await register(aio_stub, operator, new)
    async with watching(aio_stub, identities, first.revision) as second:
        await second.until_agent(new)
    assert {name for _, name, _ in second.agents} == {new}
    assert all(frame.revision > 0 for frame in second.frames)


async def test_a_watcher_from_another_database_begins_anew(
    aio_stub: Any, identities: Identities, operator: Metadata
) -> None:
    name = unique("here")
    await register(aio_stub, operator, name)
    async with watching(aio_stub, identities, 10**12) as copy:
        await copy.complete()
    assert name in {known for _, known, _ in copy.agents}
    assert 0 < copy.revision < 10**12


async def test_a_large_catalog_comes_in_bounded_frames(
    aio_stub: Any, identities: Identities, operator: Metadata
) -> None:
    prefix = unique("large")
    for number in range(10):
        filling = {"instructions": "x" * 60_000, "output_schema": {"description": "y" * 150_000}}
        await register(aio_stub, operator, f"{prefix}-{number}", **filling)
    for block in range(2):
        tools = [tool(f"{prefix}.t{block}.n{number}") for number in range(256)]
        await aio_stub.RegisterTools(pb.RegisterToolsRequest(tools=tools), metadata=operator, timeout=TIMEOUT)
    async with watching(aio_stub, identities) as copy:
        await copy.complete()
    assert max(frame.ByteSize() for frame in copy.frames) < 2 << 20
    assert sum(name.startswith(prefix) for _, name, _ in copy.agents) == 10
    assert sum(name.startswith(prefix) for _, name in copy.tools) == 512
    assert len(copy.frames) > 4


async def test_nothing_is_missed_while_many_write(aio_stub: Any, identities: Identities) -> None:
    writers = [identities.metadata(unique("tenant"), "ann", "operator") for _ in range(8)]
    prefix = unique("burst")
    async with watching(aio_stub, identities) as copy, asyncio.TaskGroup() as tasks:
        await copy.complete()
        for metadata in writers:
            for number in range(12):
                tasks.create_task(register(aio_stub, metadata, f"{prefix}-{number}"))
                tasks.create_task(register_tool(aio_stub, metadata, tool(prefix, str(number))))
        while (
            sum(name.startswith(prefix) for _, name, _ in copy.agents) < 96
            or sum(name == prefix for _, name in copy.tools) < 8
        ):
            await copy.read()


async def test_a_change_waits_for_one_with_a_lower_revision_to_commit(
    aio_stub: Any, identities: Identities, operator: Metadata, owner: Any
) -> None:
    name = unique("later")
    async with watching(aio_stub, identities) as copy, asyncio.TaskGroup() as tasks:
        await copy.complete()
        async with owner.transaction():
            taken = await owner.fetchval("SELECT registry.take_revisions(1)")
            tasks.create_task(register(aio_stub, operator, name))
            await until_blocked(owner)
            for _ in range(3):
                assert (await copy.read()).revision < taken
            assert not [known for _, known, _ in copy.agents if known == name]
        await copy.until_agent(name)
        assert copy.revision > taken


async def test_a_lost_hint_costs_only_a_tick(
    aio_stub: Any, identities: Identities, operator: Metadata, owner: Any
) -> None:
    name = unique("quiet")
    await register_tool(aio_stub, operator, tool(name, "Before."))
    async with watching(aio_stub, identities) as copy:
        await copy.complete()
        async with owner.transaction():
            await owner.execute("UPDATE registry.clock SET revision = revision + 1")
            await owner.execute(
                "UPDATE registry.tools SET description = 'After.', revision = (SELECT revision FROM registry.clock)"
                " WHERE name = $1",
                name,
            )
        start = time.monotonic()
        await copy.until_tool(name, "After.")
        assert time.monotonic() - start < 1.0


async def test_watchers_go_on_when_the_connections_to_the_database_break(
    aio_stub: Any, identities: Identities, operator: Metadata, owner: Any
) -> None:
    name = unique("after")
    async with watching(aio_stub, identities) as copy:
        await copy.complete()
        broken = await owner.fetch(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = 'mainspring_registry'"
        )
        assert len(broken) >= 2
        await register(aio_stub, operator, name)
        await copy.until_agent(name)
        for _ in range(3):
            await copy.read()


async def test_a_watcher_too_many_is_refused_until_one_goes(aio_stub: Any, identities: Identities) -> None:
    calls: list[Any] = []

    async def is_served() -> bool:
        """Whether one more watcher is served; then it stays."""
        call = aio_stub.WatchCatalog(pb.WatchCatalogRequest(), metadata=identities.service_metadata(), timeout=60)
        try:
            await asyncio.wait_for(call.read(), FRAME_SECONDS_MAX)
        except grpc.RpcError as error:
            expected = {"queue": "watchers", "limit": str(WATCHERS_MAX)}
            assert error_of(error) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", expected)
            return False
        calls.append(call)
        return True

    for _ in range(WATCHERS_MAX):
        # The streams of other tests may still be ending.
        await wait_until(is_served, what="as many watchers as allowed are served")
    assert not await is_served()
    calls.pop().cancel()
    await wait_until(is_served, what="a watcher takes the place of the one that went")
    for call in calls:
        call.cancel()


async def test_a_watcher_ends_at_its_deadline(aio_stub: Any, identities: Identities) -> None:
    call = aio_stub.WatchCatalog(pb.WatchCatalogRequest(), metadata=identities.service_metadata(), timeout=0.7)
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_malformed_request_is_refused(aio_stub: Any, identities: Identities) -> None:
    call = aio_stub.WatchCatalog(
        pb.WatchCatalogRequest(after_revision=-1), metadata=identities.service_metadata(), timeout=TIMEOUT
    )
    with pytest.raises(grpc.RpcError) as raised:
        await call.read()
    assert error_of(raised.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
