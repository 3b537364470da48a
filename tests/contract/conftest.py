"""pytest-grpc over grpc.aio: one real service per module, over a real wire, with the kit's own guard and real stores.

What a contract module writes (everything else of pytest-grpc is as its manual says):

    grpc_service = "State"                        # the one under test: mainspring.v1.StateService; wired as its own
                                                  # __main__ does it, unless the module has a fixture `grpc_wiring`

    def test_an_unknown_run_is_not_found(grpc_stub, identities):        # a synchronous stub
        with pytest.raises(grpc.RpcError) as raised:
            grpc_stub.GetRun(GetRunRequest(run_id=new_id()), metadata=identities.metadata("acme", "ann"), timeout=5)
        assert error_of(raised.value).reason == "RUN_NOT_FOUND"         # from test_framework.grpc_testing

    async def test_appends_answer(aio_stub, identities): ...            # the same server, from the test's loop

The wiring is entered and left in one task of a loop in a thread (`grpc_loop`); run something of the test's own there
with `grpc_loop.run(coroutine)`. `contract_environment` holds what a service's settings take, by field name: listen,
secrets, environment, redis_url, all *_target (this very server), and, for a service that keeps tables (`State`,
`Registry`), database_url and owner_database_url of a database of this module's own, migrated by the service's own
`migrate`. Modules that need tables of other services too say so: `grpc_databases = ("State", "Registry")`; then
`contract_databases["Registry"]` has the other URLs. All calls need a `timeout=`.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from mainspring_kit.identity import TokenVerifier

from test_framework.agents import echo_agent
from test_framework.grpc_testing import AioServerFacade, add_to_server, free_address, stub_class
from test_framework.identities import Identities, UserExecutionContext, unique
from test_framework.loop_thread import LoopThread
from test_framework.servers import Database, PostgresServer, embedded_postgres, embedded_valkey
from test_framework.stack import Stack
from tests.contract import dispatcher_calls, execution_platform, registry_calls, state_calls
from tests.contract.matrix_calls import Wire, World

AUTH_SECRET = "dev-contract-tests-sign-users-tokens-with-this"
SERVICE_SECRET = "dev-contract-tests-sign-service-tokens-with-this"
MIGRATE_SECONDS = 60
SERVICES_WITH_TABLES = ("State", "Registry")

Servicers = Mapping[str, Any]  # Any: generated servicers have no common base
Wiring = Callable[[], AbstractAsyncContextManager[Servicers]]


@pytest.fixture(scope="session", autouse=True)
def _logs_go_to_pytest() -> Iterator[None]:
    """What services log in this process is shown with the test that fails, and not otherwise."""
    structlog.configure(
        processors=[structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer(key_order=["event"])],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def identities() -> Identities:
    """Makes tokens and metadata that the servers under test accept."""
    return Identities(AUTH_SECRET, SERVICE_SECRET)


@pytest.fixture(scope="session")
def contract_directory() -> Iterator[Path]:
    """A folder for the servers, short enough for unix sockets and open to the account that PostgreSQL runs under."""
    with tempfile.TemporaryDirectory(prefix="msc-", ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture(scope="session")
def contract_postgres(contract_directory: Path) -> Iterator[PostgresServer]:
    """One real PostgreSQL for all contract modules of the session."""
    with embedded_postgres(contract_directory) as server:
        yield server


@pytest.fixture(scope="session")
def contract_redis_url(contract_directory: Path) -> Iterator[str]:
    """One real Valkey for all contract modules of the session; modules do not share tenants, so not keys either."""
    with embedded_valkey(contract_directory) as url:
        yield url


@pytest.fixture(scope="session")
def contract_templates(contract_postgres: PostgresServer) -> Iterator[Callable[[tuple[str, ...]], str]]:
    """Answers the name of a database on which the given services' migrations have run; each set is made once."""
    made: dict[tuple[str, ...], str] = {}
    loop = LoopThread("contract-templates")

    def template(services: tuple[str, ...]) -> str:
        if services not in made:
            name = loop.run(contract_postgres.create("template"))
            for service in services:
                _migrate(service, _database(contract_postgres, name, services))
            made[services] = name
        return made[services]

    try:
        yield template
    finally:
        loop.close()


@pytest.fixture(scope="module")
def contract_databases(
    request: pytest.FixtureRequest,
    grpc_loop: LoopThread,
    contract_postgres: PostgresServer,
    contract_templates: Callable[[tuple[str, ...]], str],
) -> Iterator[Mapping[str, Database]]:
    """The module's own database, by service that keeps tables in it."""
    named = getattr(request.module, "grpc_databases", (request.module.grpc_service,))
    services = tuple(sorted(set(named) & set(SERVICES_WITH_TABLES)))
    if not services:
        yield {}
        return
    name = grpc_loop.run(contract_postgres.create("contract", template=contract_templates(services)))
    yield dict.fromkeys(services, _database(contract_postgres, name, services))
    grpc_loop.run(contract_postgres.drop(name))


def _database(server: PostgresServer, name: str, services: tuple[str, ...]) -> Database:
    urls = {
        service: server.url(name, user=f"mainspring_{service.lower()}", password=f"{service.lower()}-password")
        for service in services
    }
    return Database(name, server.url(name), urls)


def _migrate(service: str, database: Database) -> None:
    environment = {
        **os.environ,
        "MAINSPRING_DATABASE_URL": database.service_urls[service],
        "MAINSPRING_OWNER_DATABASE_URL": database.owner_url,
    }
    command = [sys.executable, "-m", f"mainspring_{service.lower()}", "migrate"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=MIGRATE_SECONDS)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}"


@pytest.fixture(scope="module")
def contract_environment(
    request: pytest.FixtureRequest,
    grpc_addr: str,
    contract_redis_url: str,
    contract_databases: Mapping[str, Database],
) -> dict[str, Any]:
    """What a service's settings take, by field name; a class takes what it knows."""
    environment: dict[str, Any] = {
        "listen": grpc_addr,
        "auth_secret": AUTH_SECRET,
        "service_secret": SERVICE_SECRET,
        "environment": "development",
        "redis_url": contract_redis_url,
        **{f"{name}_target": grpc_addr for name in ("registry", "dispatcher", "execution", "state")},
    }
    database = contract_databases.get(request.module.grpc_service)
    if database is not None:
        environment["database_url"] = database.service_urls[request.module.grpc_service]
        environment["owner_database_url"] = database.owner_url
    return environment


@pytest.fixture(scope="module")
def grpc_loop() -> Iterator[LoopThread]:
    """The loop on which the module's servicers and server live; leaving it checks that nothing was left behind."""
    loop = LoopThread("contract-servers")
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def grpc_wiring(
    request: pytest.FixtureRequest,
    contract_environment: dict[str, Any],
    contract_databases: Mapping[str, Database],
) -> Wiring:
    """How the module's `grpc_service` is wired, with those that it needs beside it: several services on one server."""
    wirings: Mapping[str, Callable[[], Wiring]] = {
        "State": lambda: state_calls.wiring(contract_environment),
        "Registry": lambda: registry_calls.wiring(contract_environment),
        "Dispatcher": lambda: dispatcher_calls.wiring(contract_environment, contract_databases),
        "Execution": lambda: partial(execution_platform.platform, contract_environment, contract_databases),
    }
    return wirings[request.module.grpc_service]()


@pytest.fixture(scope="module")
def grpc_addr() -> str:
    """pytest-grpc's own keeps its probing socket for ever."""
    return free_address()


@pytest.fixture(scope="module")
def _grpc_server(grpc_loop: LoopThread) -> Iterator[AioServerFacade]:
    """The one fixture of pytest-grpc that had to change: its server is synchronous, ours are not."""
    server = AioServerFacade(grpc_loop, TokenVerifier(AUTH_SECRET, SERVICE_SECRET))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def grpc_servicer(grpc_loop: LoopThread, grpc_wiring: Wiring) -> Iterator[Servicers]:
    """What the module's wiring yields; it stays wired until the server has stopped."""
    with grpc_loop.opened(grpc_wiring) as servicers:
        yield servicers


@pytest.fixture(scope="module")
def grpc_add_to_server() -> Callable[[Servicers, Any], None]:
    """Adds all servicers that the wiring yields."""
    return add_to_server


@pytest.fixture(scope="module")
def grpc_stub_cls(request: pytest.FixtureRequest) -> Any:
    """The generated stub of the module's `grpc_service`."""
    return stub_class(request.module.grpc_service)


@pytest.fixture
async def aio_channel(grpc_server: AioServerFacade, grpc_addr: str) -> AsyncIterator[grpc.aio.Channel]:
    """A channel of the test's own loop to the module's server."""
    async with grpc.aio.insecure_channel(grpc_addr) as channel:
        yield channel


@pytest.fixture
async def aio_stub(request: pytest.FixtureRequest, aio_channel: grpc.aio.Channel) -> Any:
    """The stub of the module's `grpc_service` on the test's own loop."""
    return stub_class(request.module.grpc_service)(aio_channel)


@pytest.fixture
async def executor(aio_stub: Any, identities: Identities) -> AsyncIterator[state_calls.Executor]:
    """An executor's Append stream to the module's state service; it beats only where a test lets it."""
    async with state_calls.executing(aio_stub, identities) as opened:
        yield opened


@pytest.fixture
def user() -> UserExecutionContext:
    """A user of a tenant of the test's own."""
    return state_calls.person()


@pytest.fixture
async def desk(
    grpc_server: object, grpc_stub: object, grpc_addr: str, identities: Identities
) -> AsyncIterator[dispatcher_calls.Desk]:
    """Callers and workers of the test's own at the module's dispatcher."""
    found = dispatcher_calls.Desk(grpc_addr, identities)
    yield found
    await found.close()


@pytest.fixture
def tenant() -> str:
    """A tenant of the test's own."""
    return unique("tenant")


@pytest.fixture
async def ann(identities: Identities, aio_channel: grpc.aio.Channel) -> AsyncIterator[execution_platform.Caller]:
    """A user of a tenant of the test's own, with the echo agent, once the module's executor starts runs."""
    caller = execution_platform.Caller(unique("tenant"), unique("person"), identities, aio_channel)
    await caller.register(echo_agent())
    await caller.until_ready("echo")
    yield caller


@pytest.fixture(scope="module")
def wire(real_services_fixture: Stack) -> Iterator[Wire]:
    """The session's stack of real processes, for the modules of the matrix: any rpc of it can be called."""
    opened = Wire(real_services_fixture)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def world(wire: Wire) -> World:
    """A user of the module's own on that stack, with an agent and a finished run."""
    return World.make(wire)
