"""What clients are told of errors: a scene in which they are provoked, and what was said, whatever way it came."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import grpc
import orjson
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from mainspring.v1 import (
    execution_pb2,
    registry_pb2,
    state_pb2,
    types_pb2,
)
from mainspring_kit.errors import DOMAIN
from mainspring_kit.identity import UserExecutionContext

from test_framework.agents import Spec, scripted_agent
from test_framework.grpc_testing import stub_class
from test_framework.identities import Metadata, make_context, unique
from tests.contract.dispatcher_calls import Desk, make_call
from tests.contract.matrix_calls import CALL_SECONDS, World, rpc_named
from tests.contract.state_calls import Executor, executing

# Any in this module: stubs have no common base, fields are of whatever message, JSON is JSON.


@dataclass(frozen=True, slots=True)
class Told:
    """What a client was told. `status`: whole, where the way to the client carries details."""

    code: str
    reason: str
    metadata: Mapping[str, str]
    status: status_pb2.Status | None = None


Provocation = Callable[["Scene"], Awaitable[Told]]
PROVOKED: Final[dict[str, Provocation]] = {}


@dataclass(frozen=True, slots=True)
class Scene:
    """The stack, a user on it, and callers and workers at its dispatcher."""

    world: World
    desk: Desk

    async def rpc(self, name: str, request: Message, metadata: Metadata | None = None) -> Told:
        """What a call is refused with."""
        rpc = rpc_named(name)
        try:
            self.world.wire.answers(rpc, [request], self.world.metadata(rpc) if metadata is None else metadata)
        except grpc.RpcError as error:
            return of_call(error)
        raise AssertionError(f"{name} was answered")

    async def outcome(self, name: str, **fields: Any) -> Told:
        """What becomes of a call of a tool."""
        made = make_call(name, tenant=self.world.user.tenant_id, **fields)
        return of_error((await self.desk.calls().ask_one(made)).error)

    async def run(self, *steps: Spec, **more: Any) -> Told:
        """What a run of an agent of these steps ends with."""
        spec = scripted_agent(unique("agent"), *steps, **more)
        register, start = rpc_named("RegisterAgent"), rpc_named("StartRun")
        wire, document = self.world.wire, orjson.dumps(spec)
        wire.answer(register, registry_pb2.RegisterAgentRequest(document=document), self.world.metadata(register))
        request = execution_pb2.StartRunRequest(agent=spec["name"])
        request.wait.FromSeconds(int(CALL_SECONDS))
        return of_error(wire.answer(start, request, self.world.metadata(start)).run.error)

    async def append(self, *appends: Callable[[Executor, UserExecutionContext], state_pb2.Append]) -> Told:
        """What the last of these appends is refused with, one after the other; each is made when its turn comes."""
        state = self.world.wire.stack.services["state"][0]
        user = make_context(self.world.user.tenant_id)
        async with (
            grpc.aio.insecure_channel(state, options=(("grpc.max_send_message_length", -1),)) as channel,
            executing(stub_class("State")(channel), self.world.wire.identities) as executor,
        ):
            for make in appends:
                result = await executor.send_one(make(executor, user))
        return of_status(result.status)

    async def http(self, method: str, path: str, **options: Any) -> Told:
        """The problem that an HTTP request is answered with."""
        user = self.world.user
        token = self.world.wire.identities.token(user.tenant_id, user.user_id, "operator")
        headers = {"Authorization": f"Bearer {token}"} | options.pop("headers", {})
        url = self.world.wire.stack.gateway + path
        async with aiohttp.ClientSession() as session, session.request(method, url, headers=headers, **options) as it:
            return of_json(await it.json(content_type=None))

    async def socket(self, **options: Any) -> Told:
        """The last frame of a socket that is not let in."""
        url = self.world.wire.stack.gateway + "/v1/stream"
        async with aiohttp.ClientSession() as session, session.ws_connect(url, **options) as socket:
            return of_json(await socket.receive_json(timeout=CALL_SECONDS))


def provokes(reason: str) -> Callable[[Provocation], Provocation]:
    """Marks how a reason is provoked."""

    def mark(provocation: Provocation) -> Provocation:
        PROVOKED[reason] = provocation
        return provocation

    return mark


def of_status(status: status_pb2.Status) -> Told:
    """What a status of ours tells."""
    infos = [detail for detail in status.details if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
    (info,) = [error_details_pb2.ErrorInfo.FromString(found.value) for found in infos]
    assert info.domain == DOMAIN
    return Told(code_pb2.Code.Name(status.code), info.reason, dict(info.metadata), status)


def of_call(error: grpc.RpcError) -> Told:
    """What a failed call tells."""
    status = rpc_status.from_call(error)
    assert status is not None, f"{error.code()} came without details: {error.details()}"
    return of_status(status)


def of_error(error: types_pb2.RunError) -> Told:
    """What an error in a log or an outcome tells."""
    assert error.message
    return Told(error.code, error.reason, dict(error.metadata))


def of_json(answer: Any) -> Told:
    """What a problem or an error frame tells."""
    assert answer.get("message") or answer.get("detail"), answer
    return Told(answer["code"], answer["reason"], answer["metadata"])
