"""The registry's schema as its own role meets it: tenants apart, versions immutable, nothing owned."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from mainspring.v1 import registry_pb2

from test_framework.identities import Identities, unique
from test_framework.servers import PostgresServer
from tests.contract.registry_calls import TIMEOUT, agent, register_tool, tool

pytestmark = pytest.mark.contract
grpc_service = "Registry"

# Any in this module: generated stubs have no common base, asyncpg's connections are generic for checkers only.


@pytest.fixture
async def role(contract_environment: dict[str, Any]) -> AsyncIterator[Any]:
    """A connection as the service's own role."""
    connection = await asyncpg.connect(contract_environment["database_url"])
    yield connection
    await connection.close()


@pytest.fixture
async def tenants(aio_stub: Any, identities: Identities) -> list[str]:
    """Two tenants, each with an agent of two versions and a tool; and there is a shared tool."""
    made = [unique("tenant"), unique("tenant")]
    for tenant_id in made:
        metadata = identities.metadata(tenant_id, "ann", "operator")
        for description in ("One.", "Two."):
            await aio_stub.RegisterAgent(agent("lookup", description=description), metadata=metadata, timeout=TIMEOUT)
        await register_tool(aio_stub, metadata, tool("own"))
        admin = identities.metadata(tenant_id, "ann", "admin")
        await aio_stub.PutTenant(registry_pb2.PutTenantRequest(), metadata=admin, timeout=TIMEOUT)
    await register_tool(aio_stub, identities.service_metadata(), tool("shared.tool"))
    return made


async def be(role: Any, tenant_id: str) -> None:
    await role.execute("SELECT set_config('mainspring.tenant_id', $1, false)", tenant_id)


@pytest.mark.parametrize("table", ["agents", "agent_versions", "tools", "tenants"])
async def test_a_tenant_sees_its_own_rows_and_shared_tools_only(role: Any, tenants: list[str], table: str) -> None:
    await be(role, tenants[0])
    seen = {row["tenant_id"] for row in await role.fetch(f"SELECT tenant_id FROM registry.{table}")}
    assert seen == ({tenants[0], ""} if table == "tools" else {tenants[0]})


@pytest.mark.parametrize("tenant_id", [None, "", "nobody"])
async def test_without_a_tenant_nothing_but_shared_tools_is_seen(
    role: Any, tenants: list[str], tenant_id: str | None
) -> None:
    if tenant_id is not None:
        await be(role, tenant_id)
    assert await role.fetchval("SELECT count(*) FROM registry.agents") == 0
    assert await role.fetchval("SELECT count(*) FROM registry.agent_versions") == 0
    assert await role.fetchval("SELECT count(*) FROM registry.tools WHERE tenant_id <> ''") == 0


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO registry.agents VALUES ($1, 'intruder', 1)",
        "INSERT INTO registry.agent_versions VALUES ($1, 'lookup', 3, 0, '', '{}', '{}', '{}')",
        "INSERT INTO registry.tools VALUES ($1, 'intruder', 'v', 0, '', '{}', 1)",
        "INSERT INTO registry.tenants VALUES ($1 || '-intruder', 0, '{}')",
        "INSERT INTO registry.tools SELECT '', 'intruder', 'v', 0, $1, '{}', 1",
        "INSERT INTO registry.tools VALUES ($1, 'own', 'v', 0, '', '{}', 1)"
        " ON CONFLICT (tenant_id, name) DO UPDATE SET version = 'v'",
    ],
)
async def test_a_tenant_cannot_write_for_another_or_for_all(role: Any, tenants: list[str], statement: str) -> None:
    await be(role, tenants[0])
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
        await role.execute(statement, tenants[1])


async def test_updates_reach_own_rows_only(role: Any, tenants: list[str]) -> None:
    await be(role, tenants[0])
    assert await role.execute("UPDATE registry.agents SET newest_version = 1") == "UPDATE 1"
    await role.execute("UPDATE registry.agents SET newest_version = 2")
    assert await role.execute("UPDATE registry.tools SET description = 'Mine.'") == "UPDATE 1"
    await be(role, tenants[1])
    assert await role.fetchval("SELECT description FROM registry.tools WHERE tenant_id = $1", tenants[1]) == ""
    assert await role.fetchval("SELECT description FROM registry.tools WHERE tenant_id = ''") == ""


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE registry.agent_versions SET spec = '{}'",
        "DELETE FROM registry.agent_versions",
        "TRUNCATE registry.agent_versions",
        "UPDATE registry.agents SET name = 'other'",
        "DELETE FROM registry.agents",
        "UPDATE registry.tools SET effect = 4",
        "UPDATE registry.tools SET tenant_id = ''",
        "DELETE FROM registry.tools",
        "DELETE FROM registry.tenants",
        "UPDATE registry.tenants SET tenant_id = 'other'",
        "UPDATE registry.clock SET revision = 1",
        "ALTER TABLE registry.agents DISABLE ROW LEVEL SECURITY",
        "CREATE TABLE registry.own ()",
        "SET ROLE mainspring_catalog",
    ],
)
async def test_the_role_may_not_change_what_is_fixed(role: Any, tenants: list[str], statement: str) -> None:
    await be(role, tenants[0])
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await role.execute(statement)


async def test_a_version_is_immutable_even_for_the_owner(
    contract_environment: dict[str, Any], tenants: list[str]
) -> None:
    owner = await asyncpg.connect(contract_environment["owner_database_url"])
    try:
        with pytest.raises(asyncpg.RestrictViolationError, match="immutable: insert a new version"):
            await owner.execute("UPDATE registry.agent_versions SET spec = '{}' WHERE tenant_id = $1", tenants[0])
    finally:
        await owner.close()


async def test_the_roles_own_no_table_and_cannot_bypass_row_security(role: Any) -> None:
    names = ["mainspring_registry", "mainspring_catalog"]
    roles = await role.fetch("SELECT * FROM pg_roles WHERE rolname = ANY ($1)", names)
    assert {each["rolname"]: each["rolcanlogin"] for each in roles} == dict(zip(names, [True, False], strict=True))
    for each in roles:
        assert not (each["rolsuper"] or each["rolbypassrls"] or each["rolcreaterole"] or each["rolcreatedb"])
    owned = await role.fetchval(
        "SELECT count(*) FROM pg_class WHERE relowner IN (SELECT oid FROM pg_roles WHERE rolname = ANY ($1))", names
    )
    assert owned == 0
    functions = await role.fetch(
        "SELECT proname, proconfig FROM pg_proc JOIN pg_roles ON pg_roles.oid = proowner"
        " WHERE prosecdef AND rolname = 'mainspring_catalog'"
    )
    assert {each["proname"]: each["proconfig"] for each in functions} == {
        "take_revisions": ["search_path=pg_catalog, pg_temp"],
        "read_changes": ["search_path=pg_catalog, pg_temp"],
        "read_catalog": ["search_path=pg_catalog, pg_temp"],
        "list_tenants": ["search_path=pg_catalog, pg_temp"],
        "take_due_schedules": ["search_path=pg_catalog, pg_temp"],
        "settle_schedule": ["search_path=pg_catalog, pg_temp"],
    }


async def test_a_change_is_hinted_with_its_commit(role: Any, aio_stub: Any, identities: Identities) -> None:
    hints: asyncio.Queue[str] = asyncio.Queue()
    await role.add_listener("registry_catalog", lambda *hint: hints.put_nowait(hint[-1]))
    await register_tool(aio_stub, identities.metadata(unique("tenant"), "ann", "operator"), tool("t"))
    hint = await asyncio.wait_for(hints.get(), TIMEOUT)
    assert int(hint) == await role.fetchval("SELECT revision FROM registry.clock")


@pytest.mark.parametrize("wanted", [0, -1, 257])
async def test_revisions_are_taken_in_bounds_only(role: Any, wanted: int) -> None:
    with pytest.raises(asyncpg.InvalidParameterValueError):
        await role.fetchval("SELECT registry.take_revisions($1)", wanted)


async def test_migrations_run_twice_and_by_an_owner_that_is_no_superuser(contract_postgres: PostgresServer) -> None:
    database, owner_name = await contract_postgres.create("migrated"), unique("owner").replace("-", "_")
    superuser = await asyncpg.connect(contract_postgres.url(database))
    try:
        await superuser.execute(f"CREATE ROLE {owner_name} LOGIN CREATEROLE")
        await superuser.execute(f'ALTER DATABASE "{database}" OWNER TO {owner_name}')
        # In a cluster of its own that owner would have made these roles, and so could give them away.
        await superuser.execute(f"GRANT mainspring_registry, mainspring_catalog TO {owner_name} WITH ADMIN OPTION")
        environment = {
            **os.environ,
            "MAINSPRING_DATABASE_URL": contract_postgres.url(database, user="mainspring_registry"),
            "MAINSPRING_OWNER_DATABASE_URL": contract_postgres.url(database, user=owner_name),
        }
        for _ in range(2):
            done = await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-m", "mainspring_registry", "migrate"],
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
            assert done.returncode == 0, done.stderr
        assert await superuser.fetchval("SELECT revision FROM registry.clock") == 1
        role = await asyncpg.connect(contract_postgres.url(database, user="mainspring_registry"))
        try:
            assert await role.fetchval("SELECT registry.take_revisions(2)") == 2
            assert await role.fetch("SELECT * FROM registry.read_changes(0, 10, 10)") == []
        finally:
            await role.close()
    finally:
        await superuser.close()
        await contract_postgres.drop(database)
