"""Attach over the wire, with workers written by hand: who may, what is registered, and what a lost worker means."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from mainspring.v1 import dispatcher_pb2 as pb
from mainspring.v1 import registry_pb2, registry_pb2_grpc, types_pb2

from test_framework.grpc_testing import error_of
from test_framework.identities import Identities, unique
from tests.contract.dispatcher_calls import OK, PURE, TIMEOUT, UNSAFE, Desk, HandWorker, make_call, tool

pytestmark = pytest.mark.contract
grpc_service = "Dispatcher"
grpc_databases = ("Registry",)


async def refusal(worker: HandWorker) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as raised:
        await worker.attach()
    return error_of(raised.value)[:2]


async def listed(desk: Desk, tenant: str) -> dict[str, types_pb2.Tool]:
    """The tools that a tenant may call, by name."""
    stub: Any = registry_pb2_grpc.RegistryServiceStub(desk.channel)  # Any: generated stubs have no common base
    request = registry_pb2.ListToolsRequest(page_size=500)
    page = await stub.ListTools(request, metadata=desk.identities.metadata(tenant, "ann", "viewer"), timeout=TIMEOUT)
    return {found.name: found for found in page.tools}


async def test_tools_are_registered_for_the_workers_tenant_before_it_gets_calls(desk: Desk, tenant: str) -> None:
    worker = await desk.attached(tool("bill.read"), tool("bill.sum", effect=UNSAFE), tenant=tenant)
    assert [found.name for found in worker.registered] == ["bill.read", "bill.sum"]
    assert all(len(found.version) == 12 and not found.shared for found in worker.registered)
    assert set(await listed(desk, tenant)) >= {"bill.read", "bill.sum"}
    assert "bill.read" not in await listed(desk, unique("tenant"))


async def test_a_services_worker_serves_everybody(desk: Desk, tenant: str) -> None:
    name = f"tool.{unique('shared')}"
    worker = await desk.attached(tool(name))
    assert worker.registered[0].shared
    assert (await listed(desk, tenant))[name].shared
    stream = desk.calls()
    ids = await stream.send(make_call(name, tenant=tenant), make_call(name, tenant=unique("tenant")))
    for _ in range(2):
        await worker.finish(await worker.next_call())
    assert {result.status for result in await stream.outcomes(ids)} == {OK}


async def test_a_tool_of_another_effect_is_refused_and_none_is_registered(desk: Desk, tenant: str) -> None:
    await desk.attached(tool("act"), tenant=tenant)
    second = desk.hand_worker(tool("other"), tool("act", effect=UNSAFE), tenant=tenant)
    assert await refusal(second) == (grpc.StatusCode.ALREADY_EXISTS, "TOOL_CONFLICT")
    assert "other" not in await listed(desk, tenant)


@pytest.mark.parametrize(
    "hello",
    [
        pb.AttachHello(),
        pb.AttachHello(worker_id="w", concurrency=1),
        pb.AttachHello(worker_id="w", tools=[tool("a"), tool("a")], concurrency=1),
        pb.AttachHello(worker_id="w", tools=[tool("No Name")], concurrency=1),
        pb.AttachHello(worker_id="w", tools=[types_pb2.Tool(name="a", effect=PURE)], concurrency=1),
        pb.AttachHello(worker_id="w", tools=[tool("a")], concurrency=0),
    ],
)
async def test_a_malformed_hello_is_refused(desk: Desk, tenant: str, hello: pb.AttachHello) -> None:
    worker = desk.hand_worker(tenant=tenant)
    worker.hello = hello
    assert await refusal(worker) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")


async def test_a_worker_needs_a_token_and_the_role_operator(desk: Desk, identities: Identities, tenant: str) -> None:
    for metadata, expected in (
        ((), (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")),
        (identities.metadata(tenant, "ann", "runner"), (grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED")),
        (
            (("authorization", f"Bearer {identities.token(tenant, 'ann', 'operator', ttl_seconds=-5)}"),),
            (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID"),
        ),
    ):
        worker = HandWorker(desk.stub, metadata, pb.AttachHello())
        with pytest.raises(grpc.RpcError) as raised:
            await worker.read()
        assert error_of(raised.value)[:2] == expected


async def test_a_stream_without_a_hello_ends(desk: Desk, tenant: str) -> None:
    worker = desk.hand_worker(tool("a"), tenant=tenant)
    await worker.stream.done_writing()
    with pytest.raises(grpc.RpcError) as raised:
        await worker.read()
    assert error_of(raised.value).reason == "REQUEST_INVALID"


async def test_a_stream_that_says_nothing_is_ended(desk: Desk, tenant: str) -> None:
    worker = desk.hand_worker(tool("a"), tenant=tenant)
    with pytest.raises(grpc.RpcError) as raised:
        await asyncio.wait_for(worker.read(), TIMEOUT)
    assert error_of(raised.value)[:2] == (grpc.StatusCode.DEADLINE_EXCEEDED, "HELLO_MISSING")


async def test_a_broken_workers_repeatable_call_goes_to_another(desk: Desk, tenant: str) -> None:
    first = await desk.attached(tool("act"), tenant=tenant)
    stream = desk.calls()
    ids = await stream.send(make_call("act", tenant=tenant))
    sent = await first.next_call()
    second = await desk.attached(tool("act"), tenant=tenant)
    first.break_off()
    again = await second.next_call()
    assert (again.call_id, again.attempt, sent.attempt) == (sent.call_id, 2, 1)
    assert again.dispatch_id != sent.dispatch_id
    await second.finish(again, b'"second"')
    (result,) = await stream.outcomes(ids)
    assert (result.result, result.attempts) == (b'"second"', 2)


async def test_a_lost_workers_unsafe_call_is_lost(desk: Desk, tenant: str) -> None:
    first = await desk.attached(tool("pay", effect=UNSAFE), tenant=tenant)
    stream = desk.calls()
    call = make_call("pay", tenant=tenant, effect=UNSAFE)
    ids = await stream.send(call)
    await first.next_call()
    second = await desk.attached(tool("pay", effect=UNSAFE), tenant=tenant)
    first.break_off()
    (result,) = await stream.outcomes(ids)
    assert (result.error.code, result.error.reason) == ("UNAVAILABLE", "WORKER_LOST")
    assert dict(result.error.metadata) == {"tool": "pay", "call_id": call.call_id}
    assert second.calls == []


async def test_a_worker_that_comes_back_delivers_its_unsafe_call(desk: Desk, tenant: str) -> None:
    worker = await desk.attached(tool("pay", effect=UNSAFE), tenant=tenant, worker_id="same")
    stream = desk.calls()
    ids = await stream.send(make_call("pay", tenant=tenant, effect=UNSAFE))
    sent = await worker.next_call()
    worker.break_off()
    again = await desk.attached(tool("pay", effect=UNSAFE), tenant=tenant, worker_id="same", knows=[sent])
    await again.finish(sent, b'"paid"')
    (result,) = await stream.outcomes(ids)
    assert (result.status, result.result, result.attempts) == (OK, b'"paid"', 1)


async def test_an_unsafe_call_that_a_returning_worker_does_not_know_is_lost(desk: Desk, tenant: str) -> None:
    worker = await desk.attached(tool("pay", effect=UNSAFE), tenant=tenant, worker_id="same")
    stream = desk.calls()
    ids = await stream.send(make_call("pay", tenant=tenant, effect=UNSAFE))
    await worker.next_call()
    worker.break_off()
    again = await desk.attached(tool("pay", effect=UNSAFE), tenant=tenant, worker_id="same")
    (result,) = await stream.outcomes(ids)
    assert result.error.reason == "WORKER_LOST"
    assert again.calls == []


async def test_attaching_again_ends_the_former_stream(desk: Desk, tenant: str) -> None:
    old = await desk.attached(tool("act"), tenant=tenant, worker_id="same")
    new = await desk.attached(tool("act"), tenant=tenant, worker_id="same")
    with pytest.raises(grpc.RpcError) as raised:
        async with asyncio.timeout(TIMEOUT):
            while await old.read():
                pass
    assert error_of(raised.value).reason == "DRAINING"
    stream = desk.calls()
    ids = await stream.send(make_call("act", tenant=tenant))
    await new.finish(await new.next_call())
    assert [result.status for result in await stream.outcomes(ids)] == [OK]


async def test_the_same_worker_id_in_another_tenant_is_another_worker(desk: Desk, tenant: str) -> None:
    victim = await desk.attached(tool("act"), tenant=tenant, worker_id="same")
    stream = desk.calls()
    ids = await stream.send(make_call("act", tenant=tenant))
    sent = await victim.next_call()
    thief = await desk.attached(tool("act"), tenant=unique("tenant"), worker_id="same")
    await thief.finish(sent, b'"forged"')
    await thief.leave()
    await victim.finish(sent, b'"true"')
    assert [result.result for result in await stream.outcomes(ids)] == [b'"true"']


async def test_a_silent_worker_is_dead_after_three_seconds(desk: Desk, tenant: str) -> None:
    silent = await desk.attached(tool("act"), tenant=tenant)
    stream = desk.calls()
    ids = await stream.send(make_call("act", tenant=tenant))
    await silent.next_call()
    other = await desk.attached(tool("act"), tenant=tenant)
    await other.finish(await other.next_call())
    assert [result.status for result in await stream.outcomes(ids)] == [OK]
    with pytest.raises(grpc.RpcError) as raised:
        while await silent.read():
            pass
    assert "no beat" in str(raised.value.details())


async def test_a_draining_worker_gets_no_more_calls(desk: Desk, tenant: str) -> None:
    leaving = await desk.attached(tool("act"), tenant=tenant)
    stream = desk.calls()
    first = await stream.send(make_call("act", tenant=tenant))
    sent = await leaving.next_call()
    await leaving.stream.write(pb.AttachRequest(draining=True))
    other = await desk.attached(tool("act"), tenant=tenant)
    ids = await stream.send(*(make_call("act", tenant=tenant) for _ in range(5)))
    for _ in range(5):
        await other.finish(await other.next_call())
    await stream.outcomes(ids)
    await leaving.finish(sent, b'"last"')
    assert [result.result for result in await stream.outcomes(first)] == [b'"last"']
    await leaving.leave()
    assert leaving.calls == []


async def test_a_worker_gets_no_more_than_it_takes(desk: Desk, tenant: str) -> None:
    worker = await desk.attached(tool("act"), tenant=tenant, concurrency=2)
    stream = desk.calls()
    calls = [make_call("act", tenant=tenant) for _ in range(5)]
    ids = await stream.send(*calls)
    seen: list[str] = []
    for _ in range(5):
        await worker.until(lambda: worker.calls)
        assert len(worker.calls) <= 2
        sent = worker.calls.pop(0)
        seen.append(sent.call_id)
        await worker.finish(sent)
    await stream.outcomes(ids)
    assert seen == [call.call_id for call in calls], "in their order"


async def test_a_result_that_breaks_the_contract_is_the_tools_failure(desk: Desk, tenant: str) -> None:
    worker = await desk.attached(tool("act"), tenant=tenant)
    stream = desk.calls()
    ids = await stream.send(make_call("act", tenant=tenant))
    await worker.finish(await worker.next_call(), b'1,"run_id":"other"')
    (result,) = await stream.outcomes(ids)
    assert (result.status, result.error.reason) == (types_pb2.TOOL_STATUS_ERROR, "TOOL_FAILED")
