"""How each reason of errors.proto is provoked over a wire; test_matrix_reasons.py walks them all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import orjson
from grpc_status import rpc_status
from mainspring.v1 import (
    dispatcher_pb2,
    dispatcher_pb2_grpc,
    execution_pb2,
    registry_pb2,
    registry_pb2_grpc,
    state_pb2,
    types_pb2,
)
from mainspring_dispatcher.__main__ import wired
from mainspring_dispatcher.config import DispatcherSettings
from mainspring_dispatcher.servicer import DispatcherServicer
from mainspring_kit.errors import from_rpc_error
from mainspring_kit.identity import UserExecutionContext, new_id
from mainspring_kit.server import Service, serving

from test_framework.agents import call, echo_agent, step
from test_framework.grpc_testing import free_address, stub_class
from test_framework.identities import unique
from test_framework.waiting import wait_until
from tests.contract.dispatcher_calls import PURE, UNSAFE, make_call, tool
from tests.contract.matrix_calls import CALL_SECONDS, rpc_named
from tests.contract.reasons_told import PROVOKED, Scene, Told, of_call, of_error, of_status, provokes
from tests.contract.state_calls import Executor, completed, thinking

# Any in this module: stubs have no common base, fields are of whatever message.

__all__ = ["PROVOKED"]


@asynccontextmanager
async def served(scene: Scene, service: Service) -> AsyncIterator[grpc.aio.Channel]:
    """One more server of the kit's, for what no test may do to the stack's, and a channel to it."""
    async with (
        serving(dispatcher_settings(scene), [service]) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield channel


def dispatcher_settings(scene: Scene) -> DispatcherSettings:
    """Of a dispatcher whose registry is nowhere."""
    identities = scene.world.wire.identities
    return DispatcherSettings(
        listen=free_address(),
        auth_secret=identities.auth_secret,
        service_secret=identities.service_secret,
        environment="development",
        registry_target=free_address(),
        drain_seconds=0,
    )


class Faulty(registry_pb2_grpc.RegistryServiceServicer):
    """A servicer with a fault."""

    async def GetAgent(self, request: Any, context: Any) -> Any:
        """Fails as no code of ours may."""
        return [][len(request.name)]


@asynccontextmanager
async def lonely_dispatcher(scene: Scene) -> AsyncIterator[tuple[DispatcherServicer, Any]]:
    """A dispatcher whose registry is nowhere, and a stub of it."""
    descriptor = dispatcher_pb2.DESCRIPTOR.services_by_name["DispatcherService"]
    async with wired(dispatcher_settings(scene)) as (servicer, _):
        service = Service(descriptor, dispatcher_pb2_grpc.add_DispatcherServiceServicer_to_server, servicer)
        async with served(scene, service) as channel:
            yield servicer, stub_class("Dispatcher")(channel)


@provokes("TOKEN_MISSING")
async def token_missing(scene: Scene) -> Told:
    return await scene.rpc("ListRuns", state_pb2.ListRunsRequest(), ())


@provokes("TOKEN_INVALID")
async def token_invalid(scene: Scene) -> Told:
    return await scene.rpc("ListRuns", state_pb2.ListRunsRequest(), (("authorization", "Bearer no.to.ken"),))


@provokes("ROLE_REQUIRED")
async def role_required(scene: Scene) -> Told:
    viewer = scene.world.wire.identities.metadata("acme", "ann", "viewer")
    return await scene.rpc("StartRun", execution_pb2.StartRunRequest(agent="echo"), viewer)


@provokes("REQUEST_INVALID")
async def request_invalid(scene: Scene) -> Told:
    return await scene.rpc("GetAgent", registry_pb2.GetAgentRequest(name="x" * 100))


@provokes("CONTEXT_INVALID")
async def context_invalid(scene: Scene) -> Told:
    service = scene.world.wire.identities.service_metadata()
    return await scene.rpc("ListRuns", state_pb2.ListRunsRequest(), service)


@provokes("NOT_IMPLEMENTED")
async def not_implemented(scene: Scene) -> Told:
    state = scene.world.wire.stub("State")
    try:
        state.CloseSession(state_pb2.CloseSessionRequest(), metadata=scene.world.on_behalf(), timeout=CALL_SECONDS)
    except grpc.RpcError as error:
        return of_call(error)
    raise AssertionError("it is built: provoke another")


@provokes("INTERNAL")
async def internal(scene: Scene) -> Told:
    descriptor = registry_pb2.DESCRIPTOR.services_by_name["RegistryService"]
    add = registry_pb2_grpc.add_RegistryServiceServicer_to_server
    async with served(scene, Service(descriptor, add, Faulty())) as channel:  # type: ignore[abstract]  # one rpc is enough
        request = registry_pb2.GetAgentRequest(name="a")
        return await _refused(stub_class("Registry")(channel).GetAgent(request, metadata=scene.world.on_behalf()))


@provokes("DEADLINE_EXCEEDED")
async def deadline_exceeded(scene: Scene) -> Told:
    """grpc itself may find it out first, at either end, and says no reason then; ours does when it is asked in time."""
    state, metadata = scene.world.wire.stub("State"), scene.world.metadata(rpc_named("ListRuns"))
    for _ in range(100):
        try:
            state.ListRuns(state_pb2.ListRunsRequest(), metadata=(*metadata, ("grpc-timeout", "1u")))
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            if rpc_status.from_call(error) is not None:
                return of_call(error)
    raise AssertionError("the service was never asked in time")


@provokes("CANCELLED")
async def cancelled(scene: Scene) -> Told:
    """Whoever cancels knows it without being told: the reason is the client's own word for it."""
    rpc = rpc_named("WaitRun")
    wait = scene.world.wire.stub("State").WaitRun
    asked = state_pb2.WaitRunRequest(run_id=scene.world.start())
    future = wait.future(asked, metadata=scene.world.metadata(rpc), timeout=CALL_SECONDS)
    future.cancel()
    error = from_rpc_error(future)
    return Told(error.code.name, error.reason_name, {"method": rpc.path})


@provokes("PEER_UNAVAILABLE")
async def peer_unavailable(scene: Scene) -> Told:
    async with lonely_dispatcher(scene) as (_, stub):
        attach = stub.Attach(metadata=scene.world.on_behalf(), timeout=CALL_SECONDS)
        hello = dispatcher_pb2.AttachHello(worker_id=new_id(), tools=[tool("t")], concurrency=1)
        await attach.write(dispatcher_pb2.AttachRequest(hello=hello))
        return await _refused(attach.read())


@provokes("QUEUE_FULL")
async def queue_full(scene: Scene) -> Told:
    rpc = rpc_named("Follow")
    wanted = [state_pb2.Subscribe(subscription_id=number, run_id=new_id()) for number in range(1, 1_002)]
    call = scene.world.wire.open(rpc, [state_pb2.FollowRequest(subscribe=wanted)], scene.world.metadata(rpc))
    deliveries = (delivery for frame in call for delivery in frame.deliveries)
    refused = next(delivery for delivery in deliveries if delivery.subscription_id == len(wanted))
    call.cancel()
    return of_status(refused.status)


@provokes("PAYLOAD_TOO_LARGE")
async def payload_too_large(scene: Scene) -> Told:
    return await scene.append(lambda executor, user: executor.create(user, input=bytes((16 << 20) + 1)))


@provokes("DRAINING")
async def draining(scene: Scene) -> Told:
    async with lonely_dispatcher(scene) as (servicer, stub):
        await servicer.drain(0)
        return await _refused(stub.CallTools(metadata=scene.world.on_behalf(), timeout=CALL_SECONDS).read())


@provokes("ORIGIN_REFUSED")
async def origin_refused(scene: Scene) -> Told:
    return await scene.socket(headers={"Origin": "https://elsewhere.example"})


@provokes("SUBPROTOCOL_REFUSED")
async def subprotocol_refused(scene: Scene) -> Told:
    return await scene.socket(protocols=("other",))


@provokes("ROUTE_NOT_FOUND")
async def route_not_found(scene: Scene) -> Told:
    return await scene.http("GET", "/v1/nothing")


@provokes("METHOD_NOT_ALLOWED")
async def method_not_allowed(scene: Scene) -> Told:
    return await scene.http("PATCH", "/v1/runs")


@provokes("MEDIA_TYPE_REFUSED")
async def media_type_refused(scene: Scene) -> Told:
    return await scene.http("POST", "/v1/runs", data=b"<run/>", headers={"Content-Type": "text/xml"})


@provokes("AGENT_NOT_FOUND")
async def agent_not_found(scene: Scene) -> Told:
    return await scene.rpc("GetAgent", registry_pb2.GetAgentRequest(name="nobody"))


@provokes("VERSION_NOT_FOUND")
async def version_not_found(scene: Scene) -> Told:
    return await scene.rpc("GetAgent", registry_pb2.GetAgentRequest(name=scene.world.agent, version="77"))


@provokes("SPEC_INVALID")
async def spec_invalid(scene: Scene) -> Told:
    document = orjson.dumps(echo_agent() | {"kind": "Robot"})
    return await scene.rpc("RegisterAgent", registry_pb2.RegisterAgentRequest(document=document))


@provokes("TOOL_CONFLICT")
async def tool_conflict(scene: Scene) -> Told:
    register = rpc_named("RegisterTools")
    name = unique("matrix.tool")
    request = registry_pb2.RegisterToolsRequest(tools=[tool(name, effect=PURE)])
    scene.world.wire.answer(register, request, scene.world.metadata(register))
    return await scene.rpc("RegisterTools", registry_pb2.RegisterToolsRequest(tools=[tool(name, effect=UNSAFE)]))


@provokes("RUN_NOT_FOUND")
async def run_not_found(scene: Scene) -> Told:
    return await scene.rpc("GetRun", state_pb2.GetRunRequest(run_id=new_id()))


@provokes("SESSION_NOT_FOUND")
async def session_not_found(scene: Scene) -> Told:
    return await scene.rpc("GetSession", state_pb2.GetSessionRequest(session_id=unique("session")))


@provokes("SESSION_EXISTS")
async def session_exists(scene: Scene) -> Told:
    taken = state_pb2.CreateSessionRequest(session_id=scene.world.user.session_id)
    return await scene.rpc("CreateSession", taken)


@provokes("IDEMPOTENCY_KEY_REUSED")
async def idempotency_key_reused(scene: Scene) -> Told:
    rpc, key = rpc_named("StartRun"), unique("key")
    request = execution_pb2.StartRunRequest(agent=scene.world.agent, idempotency_key=key)
    scene.world.wire.answer(rpc, request, scene.world.metadata(rpc))
    request.input = b'{"other": 1}'
    return await scene.rpc("StartRun", request)


@provokes("RUN_ENDED")
async def run_ended(scene: Scene) -> Told:
    return await scene.rpc("CancelRun", execution_pb2.CancelRunRequest(run_id=scene.world.run_id))


def _create(executor: Executor, user: UserExecutionContext) -> state_pb2.Append:
    """The create of the scene's one run, whose id is the context's."""
    append = executor.create(user)
    append.run_id = append.events[0].run_id = user.run_id
    return append


@provokes("RUN_EXISTS")
async def run_exists(scene: Scene) -> Told:
    return await scene.append(_create, _create)


@provokes("APPEND_STALE")
async def append_stale(scene: Scene) -> Told:
    return await scene.append(_create, lambda executor, user: executor.append(user, user.run_id, thinking(), after=7))


@provokes("TRANSITION_ILLEGAL")
async def transition_illegal(scene: Scene) -> Told:
    return await scene.append(
        _create, lambda executor, user: executor.append(user, user.run_id, completed(), thinking(), after=1)
    )


@provokes("EVENT_REFUSED")
async def event_refused(scene: Scene) -> Told:
    return await scene.append(
        _create,
        lambda executor, user: executor.append(user, user.run_id, thinking(), after=1, consumed_request_ids=["a\x00b"]),
    )


@provokes("SESSION_BUSY")
async def session_busy(scene: Scene) -> Told:
    def reject(executor: Executor, user: UserExecutionContext) -> state_pb2.Append:
        return executor.create(user, policy=types_pb2.SESSION_POLICY_REJECT)

    return await scene.append(reject, reject)


@provokes("RUN_TIMED_OUT")
async def run_timed_out(scene: Scene) -> Told:
    return await scene.run(step("Slowly.", delay="20s", result=1), limits={"timeout": "1s"})


@provokes("STEPS_EXHAUSTED")
async def steps_exhausted(scene: Scene) -> Told:
    echo = call("diagnostics.echo", value=1)
    return await scene.run(step("a", echo), step("b", echo), step("c", result=1), limits={"max_steps": 1})


@provokes("MODEL_FAILED")
async def model_failed(scene: Scene) -> Told:
    return await scene.run(step("a", fail={"code": "UNAVAILABLE", "message": "down", "times": 100}))


@provokes("TEMPLATE_INVALID")
async def template_invalid(scene: Scene) -> Told:
    return await scene.run(step("a", result="{{input.nothing}}"))


@provokes("RESULT_INVALID")
async def result_invalid(scene: Scene) -> Told:
    return await scene.run(step("a", result=1), output_schema={"type": "string"})


@provokes("TOOL_NOT_FOUND")
async def tool_not_found(scene: Scene) -> Told:
    return await scene.outcome("no.such")


@provokes("TOOL_ARGUMENTS_INVALID")
async def tool_arguments_invalid(scene: Scene) -> Told:
    return await scene.outcome("diagnostics.sleep", arguments=b'{"seconds": -1}')


@provokes("TOOL_TIMED_OUT")
async def tool_timed_out(scene: Scene) -> Told:
    return await scene.outcome("diagnostics.sleep", arguments=b'{"seconds": 20}', seconds=0.2)


@provokes("TOOL_FAILED")
async def tool_failed(scene: Scene) -> Told:
    return await scene.outcome("diagnostics.fail")


@provokes("WORKER_UNAVAILABLE")
async def worker_unavailable(scene: Scene) -> Told:
    register, name = rpc_named("RegisterTools"), unique("matrix.tool")
    request = registry_pb2.RegisterToolsRequest(tools=[tool(name)])
    scene.world.wire.answer(register, request, scene.world.metadata(register))
    return await scene.outcome(name, seconds=2.0)


@provokes("WORKER_LOST")
async def worker_lost(scene: Scene) -> Told:
    name, tenant_id = unique("matrix.tool"), scene.world.user.tenant_id
    worker = await scene.desk.attached(tool(name, effect=UNSAFE), tenant=tenant_id)
    calls = scene.desk.calls()
    item_ids = await calls.send(make_call(name, tenant=tenant_id, effect=UNSAFE))
    await worker.next_call()
    worker.break_off()
    return of_error((await calls.outcomes(item_ids))[0].error)


@provokes("TOOL_CANCELLED")
async def tool_cancelled(scene: Scene) -> Told:
    tenant_id, calls = scene.world.user.tenant_id, scene.desk.calls()
    made = make_call("diagnostics.sleep", tenant=tenant_id, arguments=b'{"seconds": 20}')
    item_ids = await calls.send(made)
    cancel = dispatcher_pb2.CancelCallsRequest(tenant_id=tenant_id, call_ids=[made.call_id])

    async def is_found() -> bool:
        answer = await scene.desk.stub.CancelCalls(cancel, metadata=scene.desk.metadata(""), timeout=CALL_SECONDS)
        return bool(answer.outcomes[0].found)

    await wait_until(is_found, what="the call is under way")
    return of_error((await calls.outcomes(item_ids))[0].error)


async def _refused(answer: Awaitable[Any]) -> Told:
    """What awaiting raises."""
    with suppress(asyncio.InvalidStateError):
        try:
            got = await answer
        except grpc.RpcError as error:
            return of_call(error)
        raise AssertionError(f"it was answered: {got}")
    raise AssertionError("the call broke")
