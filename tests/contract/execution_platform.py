"""What the contract tests of execution stand on: all four services over one wire, a worker, and a user with agents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import orjson
from mainspring.v1 import events_pb2, execution_pb2, registry_pb2, state_pb2, types_pb2
from mainspring.v1 import execution_pb2_grpc as execution_rpc
from mainspring.v1 import registry_pb2_grpc as registry_rpc
from mainspring.v1 import state_pb2_grpc as state_rpc
from mainspring.worker import Worker, load_tools
from mainspring_dispatcher.__main__ import wired as wired_dispatcher
from mainspring_dispatcher.config import DispatcherSettings
from mainspring_execution.__main__ import wired as wired_execution
from mainspring_execution.config import ExecutionSettings
from mainspring_kit.identity import ServiceTokens
from mainspring_kit.tasks import background
from mainspring_registry.__main__ import wired as wired_registry
from mainspring_registry.config import RegistrySettings
from mainspring_state.__main__ import wired as wired_state
from mainspring_state.config import StateSettings

from test_framework.agents import Spec
from test_framework.identities import Identities, unique
from test_framework.servers import Database
from test_framework.waiting import wait_until

CALL_SECONDS = 20
TOOL_MODULES = ["mainspring.diagnostics", "test_framework.tools", "tests.contract.execution_tools"]


@asynccontextmanager
async def platform(
    environment: Mapping[str, Any], databases: Mapping[str, Database]
) -> AsyncIterator[dict[str, Any]]:  # Any: settings and servicers differ by service
    """All four services and a worker with the diagnostic tools."""

    def urls(service: str) -> dict[str, str]:
        database = databases[service]
        return {"database_url": database.service_urls[service], "owner_database_url": database.owner_url}

    state_settings = StateSettings(**{**environment, **urls("State")})
    registry_settings = RegistrySettings(**{**environment, **urls("Registry")})
    async with AsyncExitStack() as stack:
        state = await stack.enter_async_context(wired_state(state_settings))
        registry, _ = await stack.enter_async_context(wired_registry(registry_settings))
        dispatcher, _ = await stack.enter_async_context(wired_dispatcher(DispatcherSettings(**environment)))
        execution = await stack.enter_async_context(wired_execution(ExecutionSettings(**environment)))
        tokens = ServiceTokens(environment["service_secret"], "worker")
        worker = Worker(
            load_tools(TOOL_MODULES),
            target=environment["dispatcher_target"],
            token=lambda: tokens.bearer().removeprefix("Bearer "),
        )
        await stack.enter_async_context(background(worker.run(asyncio.Event())))
        yield {
            "State": state[0] if isinstance(state, tuple) else state,
            "Registry": registry,
            "Dispatcher": dispatcher,
            "Execution": execution.servicer,
        }


@dataclass(frozen=True, slots=True)
class Caller:
    """A user of a tenant, with stubs that answer on the test's loop."""

    tenant_id: str
    user_id: str
    identities: Identities
    channel: grpc.aio.Channel

    @property
    def execution(self) -> Any:
        """Stubs have no common base: Any."""
        return execution_rpc.ExecutionServiceStub(self.channel)

    @property
    def state(self) -> Any:
        """As above."""
        return state_rpc.StateServiceStub(self.channel)

    def options(self, role: str = "runner") -> dict[str, Any]:
        """Keyword arguments of a call as this user."""
        return {"metadata": self.identities.metadata(self.tenant_id, self.user_id, role), "timeout": CALL_SECONDS}

    def other_user(self) -> Caller:
        """Another user of the same tenant."""
        return Caller(self.tenant_id, unique("person"), self.identities, self.channel)

    async def register(self, spec: Spec) -> types_pb2.Agent:
        """Registers an agent."""
        stub = registry_rpc.RegistryServiceStub(self.channel)
        request = registry_pb2.RegisterAgentRequest(document=orjson.dumps(spec))
        return (await stub.RegisterAgent(request, **self.options("operator"))).agent

    async def until_ready(self, agent: str) -> None:
        """Until runs can be started and tools are served: one run of the agent has completed."""

        async def completes() -> bool:
            try:
                run = await self.run(agent, "ready?")
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                return False
            return run.state == types_pb2.RUN_STATE_COMPLETED

        await wait_until(completes, what="a first run")

    async def start(self, agent: str, value: Any = None, **fields: Any) -> execution_pb2.StartRunResponse:
        """Starts a run; Any: a JSON value, and fields of StartRunRequest."""
        request = execution_pb2.StartRunRequest(agent=agent, input=orjson.dumps({"value": value}), **fields)
        response: execution_pb2.StartRunResponse = await self.execution.StartRun(request, **self.options())
        return response

    async def run(self, agent: str, value: Any = None, **fields: Any) -> types_pb2.Run:
        """Starts a run and waits for its end."""
        started = await self.start(agent, value, **fields)
        return await self.end_of(started.run_id)

    async def end_of(self, run_id: str) -> types_pb2.Run:
        """The run when it has ended."""
        request = state_pb2.WaitRunRequest(run_id=run_id)
        request.timeout.FromSeconds(CALL_SECONDS - 5)
        run: types_pb2.Run = (await self.state.WaitRun(request, **self.options())).run
        assert run.HasField("end_time"), f"run {run_id} has not ended: it is {types_pb2.RunState.Name(run.state)}"
        return run

    async def log(self, run_id: str) -> list[events_pb2.RunEvent]:
        """The run's whole log, checked to be gapless."""
        page = await self.state.ReadEvents(state_pb2.ReadEventsRequest(run_id=run_id), **self.options())
        assert [event.seq for event in page.events] == list(range(1, page.last_seq + 1))
        return list(page.events)

    async def reached(self, run_id: str, payload: str) -> list[events_pb2.RunEvent]:
        """The log once it holds an event of this kind."""

        async def log() -> list[events_pb2.RunEvent]:
            events = await self.log(run_id)
            return events if payload in names(events) else []

        return await wait_until(log, what=f"{payload} in the log of {run_id}")


def names(events: list[events_pb2.RunEvent]) -> list[str]:
    """The kinds of events, in order."""
    return [event.WhichOneof("payload") or "" for event in events]


def terminal(events: list[events_pb2.RunEvent]) -> Any:
    """The payload of the last event, checked to be the one terminal event: Any of four."""
    ends = {"agent_completed", "agent_failed", "agent_cancelled", "agent_timed_out"}
    assert [name in ends for name in names(events)].count(True) == 1
    last = names(events)[-1]
    assert last in ends
    return getattr(events[-1], last)
