"""How the reasons of runs that wait, stand in line or come at a time are provoked; see `reasons_provoked`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from mainspring.v1 import execution_pb2, registry_pb2, state_pb2
from mainspring_kit.identity import UserExecutionContext, new_id

from test_framework.grpc_testing import stub_class
from test_framework.identities import make_context, unique
from tests.contract.matrix_calls import CALL_SECONDS
from tests.contract.reasons_told import Scene, Told, of_call, provokes
from tests.contract.state_calls import Executor, executing
from tests.contract.state_inputs import ALLOW, Asker, ask_person, moment

# Any in this module: stubs have no common base, fields are of whatever message.


@asynccontextmanager
async def _asked(scene: Scene, **fields: Any) -> AsyncIterator[tuple[Asker, str, grpc.aio.Channel]]:
    """Somebody who is asked something, and the approval's id."""
    stack, identities = scene.world.wire.stack, scene.world.wire.identities
    user = make_context(scene.world.user.tenant_id)
    async with (
        grpc.aio.insecure_channel(stack.services["state"][0]) as channel,
        grpc.aio.insecure_channel(stack.services["execution"][0]) as execution,
        executing(stub_class("State")(channel), identities) as executor,
    ):
        approval_id = await ask_person(executor, user, **fields)
        yield Asker(stub_class("State")(channel), identities, user), approval_id, execution


async def _refused(asker: Asker, approval_id: str) -> Told:
    """What another answer is refused with."""
    answer = state_pb2.ApprovalInput(approval_id=approval_id, decision=ALLOW)
    try:
        await asker.put(approval_id.partition(".")[0], approval=answer)
    except grpc.RpcError as error:
        return of_call(error)
    raise AssertionError("it was answered")


@provokes("APPROVAL_NOT_FOUND")
async def approval_not_found(scene: Scene) -> Told:
    return await scene.rpc("GetApproval", state_pb2.GetApprovalRequest(approval_id=f"{new_id()}.2"))


@provokes("APPROVAL_RESOLVED")
async def approval_resolved(scene: Scene) -> Told:
    async with _asked(scene) as (asker, approval_id, _):
        assert await asker.answer(approval_id) == ""
        return await _refused(asker, approval_id)


@provokes("APPROVAL_EXPIRED")
async def approval_expired(scene: Scene) -> Told:
    async with _asked(scene, expires_time=moment(-10)) as (asker, approval_id, _):
        return await _refused(asker, approval_id)


@provokes("ANSWER_INVALID")
async def answer_invalid(scene: Scene) -> Told:
    async with _asked(scene, answer_schema=b'{"type":"object"}') as (asker, approval_id, execution):
        request = execution_pb2.ResolveApprovalRequest(approval_id=approval_id, decision=ALLOW, data=b"1")
        try:
            await stub_class("Execution")(execution).ResolveApproval(
                request, metadata=asker.metadata, timeout=CALL_SECONDS
            )
        except grpc.RpcError as error:
            return of_call(error)
        raise AssertionError("it was answered")


@provokes("BACKLOG_FULL")
async def backlog_full(scene: Scene) -> Told:
    tenant_id = unique("tenant")

    def create(executor: Executor, user: UserExecutionContext) -> state_pb2.Append:
        return executor.create(make_context(tenant_id), queue_only=True, backlog_max=1)

    return await scene.append(create, create)


@provokes("SCHEDULE_NOT_FOUND")
async def schedule_not_found(scene: Scene) -> Told:
    return await scene.rpc("GetSchedule", registry_pb2.GetScheduleRequest(name="none"))


@provokes("TENANT_NOT_FOUND")
async def tenant_not_found(scene: Scene) -> Told:
    return await scene.rpc("GetTenant", registry_pb2.GetTenantRequest(tenant_id=unique("tenant")))
