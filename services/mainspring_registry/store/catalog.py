"""What the registry remembers, in PostgreSQL's schema `registry`: agents, versions, tools, tenants. Decides nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

from mainspring.v1 import registry_pb2, types_pb2
from mainspring_kit import postgres
from mainspring_kit.identity import UserExecutionContext

from mainspring_registry.core import catalog
from mainspring_registry.core.tenants import tenant_not_found
from mainspring_registry.core.tools import changed_tools

if TYPE_CHECKING:
    import asyncpg

REVISION_SECONDS_MAX: Final = 2.0

_CHANNEL: Final = "registry_catalog"
_SQL: Final = postgres.load_queries("mainspring_registry")


class Store:
    """The catalog's tables. Every method is one transaction; its user sees what row-level security shows them."""

    def __init__(self, pool: postgres.Pool) -> None:
        self._pool = pool

    async def register_agent(self, user: UserExecutionContext, agent: types_pb2.Agent) -> tuple[types_pb2.Agent, bool]:
        """Stores a specification as the next version: that and True; or the newest and False when it is the same."""
        spec = agent.spec.decode()
        async with postgres.as_user(self._pool, user.tenant_id, user_id=user.user_id) as connection:
            newest = await connection.fetchrow(_SQL["read_newest"], user.tenant_id, agent.name)
            if newest is not None and newest["spec"] == spec:
                return _to_agent(newest), False
            # From here to the commit nobody else writes to the catalog. Who held us back may have brought this very
            # specification: look again.
            revision = await connection.fetchval(_SQL["take_revisions"], 1)
            newest = await connection.fetchrow(_SQL["read_newest"], user.tenant_id, agent.name)
            if newest is not None and newest["spec"] == spec:
                return _to_agent(newest), False
            row = await connection.fetchrow(
                _SQL["insert_version"],
                user.tenant_id,
                agent.name,
                revision,
                agent.description,
                json.dumps(dict(agent.labels)),
                list(agent.capabilities),
                spec,
            )
            assert row is not None, "an insert that returns its row"
        return _to_agent(row), True

    async def get_agent(self, user: UserExecutionContext, name: str, *, version: int) -> types_pb2.Agent:
        """A version, 0: the newest. AGENT_NOT_FOUND, VERSION_NOT_FOUND."""
        async with postgres.as_user(self._pool, user.tenant_id, user_id=user.user_id) as connection:
            row = None
            if version:
                row = await connection.fetchrow(_SQL["read_version"], user.tenant_id, name, version)
            if row is None:
                row = await connection.fetchrow(_SQL["read_newest"], user.tenant_id, name)
                if row is None:
                    raise catalog.agent_not_found(name)
                if version:
                    raise catalog.version_not_found(name, str(version))
        return _to_agent(row)

    async def list_agents(
        self, user: UserExecutionContext, request: registry_pb2.ListAgentsRequest
    ) -> tuple[list[types_pb2.Agent], str]:
        """A page of agents by name, and the token of the next."""
        size = catalog.read_page_size(request.page_size)
        async with postgres.as_user(self._pool, user.tenant_id, user_id=user.user_id) as connection:
            rows = await connection.fetch(
                _SQL["list_agents"],
                user.tenant_id,
                catalog.read_token(request.page_token),
                request.capability,
                json.dumps(dict(request.labels)),
                request.text,
                size + 1,
                catalog.PAGE_BYTES_MAX,
            )
        return [_to_agent(row) for row in rows[:size]], _next_token(rows, size, key="name")

    async def list_versions(
        self, user: UserExecutionContext, request: registry_pb2.ListVersionsRequest
    ) -> tuple[list[types_pb2.Agent], str]:
        """A page of an agent's versions, newest first, and the token of the next. AGENT_NOT_FOUND."""
        size = catalog.read_page_size(request.page_size)
        async with postgres.as_user(self._pool, user.tenant_id, user_id=user.user_id) as connection:
            rows = await connection.fetch(
                _SQL["list_versions"],
                user.tenant_id,
                request.name,
                catalog.read_version_token(request.page_token),
                size + 1,
                catalog.PAGE_BYTES_MAX,
            )
        if not rows:
            raise catalog.agent_not_found(request.name)
        return [_to_agent(row) for row in rows[:size]], _next_token(rows, size, key="version")

    async def register_tools(
        self, user: UserExecutionContext | None, tools: Sequence[types_pb2.Tool]
    ) -> list[types_pb2.Tool]:
        """Stores the tools of the user's tenant, None: shared ones; all, or none with TOOL_CONFLICT."""
        tenant_id = user.tenant_id if user else ""
        names = [tool.name for tool in tools]
        async with self._for_tools(user) as connection:
            stored = await _read_tools(connection, tenant_id, names=names)
            if not changed_tools(tools, stored):
                return [stored[name] for name in names]
            # As for versions: alone from here on, so look again.
            revision = await connection.fetchval(_SQL["take_revisions"], len(tools))
            changed = changed_tools(tools, await _read_tools(connection, tenant_id, names=names))
            await connection.execute(
                _SQL["write_tools"],
                tenant_id,
                revision,
                [tool.name for tool in changed],
                [tool.version for tool in changed],
                [tool.description for tool in changed],
                [tool.input_schema.decode() for tool in changed],
                [tool.effect for tool in changed],
                [tool.timeout.ToTimedelta() if tool.HasField("timeout") else None for tool in changed],
            )
            stored = await _read_tools(connection, tenant_id, names=names)
        return [stored[name] for name in names]

    async def list_tools(
        self, user: UserExecutionContext, request: registry_pb2.ListToolsRequest
    ) -> tuple[list[types_pb2.Tool], str]:
        """A page of the tools that the user's tenant may call by name, and the token of the next."""
        size = catalog.read_page_size(request.page_size)
        async with postgres.as_user(self._pool, user.tenant_id, user_id=user.user_id) as connection:
            rows = await connection.fetch(
                _SQL["list_tools"],
                user.tenant_id,
                catalog.read_token(request.page_token),
                size + 1,
                catalog.PAGE_BYTES_MAX,
            )
        return [_to_tool(row) for row in rows[:size]], _next_token(rows, size, key="name")

    async def put_tenant(
        self, user: UserExecutionContext, limits: registry_pb2.TenantLimits | None
    ) -> registry_pb2.Tenant:
        """Stores the limits of the user's tenant, None: it has none any more. TENANT_NOT_FOUND: it had none."""
        values = {} if limits is None else {field.name: value for field, value in limits.ListFields()}
        async with postgres.as_user(self._pool, user.tenant_id, user_id=user.user_id) as connection:
            revision = await connection.fetchval(_SQL["take_revisions"], 1)
            row = await connection.fetchrow(
                _SQL["put_tenant"], user.tenant_id, revision, json.dumps(values), limits is None
            )
        if row is None:
            raise tenant_not_found(user.tenant_id)
        return _to_tenant(row)

    async def get_tenant(self, user: UserExecutionContext) -> registry_pb2.Tenant:
        """The limits of the user's tenant. TENANT_NOT_FOUND."""
        async with postgres.as_user(self._pool, user.tenant_id, user_id=user.user_id) as connection:
            row = await connection.fetchrow(_SQL["read_tenant"], user.tenant_id)
        if row is None:
            raise tenant_not_found(user.tenant_id)
        return _to_tenant(row)

    async def list_tenants(
        self, user: UserExecutionContext | None, request: registry_pb2.ListTenantsRequest
    ) -> tuple[list[registry_pb2.Tenant], str]:
        """A page of tenants by id, and the token of the next. None: of all of them, else of the user's own."""
        size, after = catalog.read_page_size(request.page_size), catalog.read_token(request.page_token)
        if user is not None:
            async with postgres.as_user(self._pool, user.tenant_id, user_id=user.user_id) as connection:
                row = await connection.fetchrow(_SQL["read_tenant"], user.tenant_id)
            return [_to_tenant(row)] if row is not None and row["tenant_id"] > after else [], ""
        with postgres.reachable():
            rows = await self._pool.fetch(_SQL["list_tenants"], after, size + 1)
        token = catalog.write_token(rows[size - 1]["tenant_id"]) if len(rows) > size else ""
        return [_to_tenant(row) for row in rows[:size]], token

    async def read_revision(self) -> int:
        """The revision of the newest change."""
        with postgres.reachable():
            return int(await self._pool.fetchval(_SQL["read_revision"]))

    async def read_changes(self, after_revision: int) -> registry_pb2.WatchCatalogResponse | None:
        """The next frame of changes in all tenants after a revision, and the revision of its last. None: no more."""
        frame = registry_pb2.WatchCatalogResponse(revision=after_revision)
        with postgres.reachable():
            rows = await self._pool.fetch(
                _SQL["read_catalog"], after_revision, catalog.FRAME_ITEMS_MAX, catalog.FRAME_BYTES_MAX
            )
        for row in rows:
            frame.revision = row["revision"]
            if row["kind"] == "agent":
                frame.agents.add(tenant_id=row["tenant_id"], agent=_to_agent(row, spec="body"))
            elif row["kind"] == "tenant":
                frame.tenants.add(
                    tenant=_to_tenant(row, limits="body", update_time="create_time"), deleted=row["deleted"]
                )
            else:
                frame.tools.add(tenant_id=row["tenant_id"], tool=_to_tool(row, input_schema="body"))
        return frame if rows else None

    @asynccontextmanager
    async def _for_tools(self, user: UserExecutionContext | None) -> AsyncIterator[postgres.Connection]:
        """A transaction of the user's, None: one that may write shared tools."""
        if user is not None:
            async with postgres.as_user(self._pool, user.tenant_id, user_id=user.user_id) as connection:
                yield connection
        else:
            async with postgres.as_user(self._pool, "", user_id="") as connection:
                await connection.execute(_SQL["allow_shared_tools"])
                yield connection


class RevisionReader:
    """A connection of its own that reads the newest revision and hears hints of newer ones."""

    def __init__(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        self._connection = connection
        self._hint = asyncio.Event()

    async def read(self) -> int:
        """The revision of the newest change. Hints of later ones are kept for `wait`."""
        self._hint.clear()
        return int(await self._connection.fetchval(_SQL["read_revision"], timeout=REVISION_SECONDS_MAX))

    async def wait(self, seconds: float) -> None:
        """Until a hint comes, or for so long. A lost hint costs only this time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hint.wait()

    async def listen(self) -> None:
        """Begins to hear hints."""
        await self._connection.add_listener(_CHANNEL, self._on_hint)

    def _on_hint(self, *_: object) -> None:
        self._hint.set()


@asynccontextmanager
async def open_revisions(database_url: str) -> AsyncIterator[RevisionReader]:
    """A RevisionReader while the block runs. Raises what `postgres.UNREACHABLE` lists, then and in its methods."""
    connection = await postgres.connect_one(database_url)
    try:
        reader = RevisionReader(connection)
        await reader.listen()
        yield reader
    finally:
        await connection.close(timeout=REVISION_SECONDS_MAX)


async def _read_tools(
    connection: postgres.Connection, tenant_id: str, *, names: Sequence[str]
) -> dict[str, types_pb2.Tool]:
    rows = await connection.fetch(_SQL["read_tools"], tenant_id, names)
    return {row["name"]: _to_tool(row) for row in rows}


def _next_token(rows: Sequence[asyncpg.Record], size: int, *, key: str) -> str:
    """The token of the next page: more rows were found than this one holds, which its size or its bytes cut."""
    held = min(len(rows), size)
    return catalog.write_token(rows[held - 1][key]) if held and rows[0]["found"] > held else ""


def _to_agent(row: asyncpg.Record, *, spec: str = "spec") -> types_pb2.Agent:
    return types_pb2.Agent(
        name=row["name"],
        version=row["version"],
        description=row["description"],
        labels=json.loads(row["labels"]),
        capabilities=row["capabilities"],
        spec=row[spec].encode(),
        create_time=row["create_time"],
    )


def _to_tool(row: asyncpg.Record, *, input_schema: str = "input_schema") -> types_pb2.Tool:
    return types_pb2.Tool(
        name=row["name"],
        description=row["description"],
        input_schema=row[input_schema].encode(),
        effect=row["effect"],
        timeout=row["timeout"],
        version=row["version"],
        shared=not row["tenant_id"],
    )


def _to_tenant(row: asyncpg.Record, *, limits: str = "limits", update_time: str = "update_time") -> registry_pb2.Tenant:
    return registry_pb2.Tenant(
        tenant_id=row["tenant_id"],
        limits=registry_pb2.TenantLimits(**json.loads(row[limits])),
        update_time=row[update_time],
    )
