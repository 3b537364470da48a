"""CancelCalls over the wire: it reaches the coroutine, and says what it knows of each call."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import grpc
import pytest
from mainspring import diagnostics
from mainspring.tool import ToolContext, tool
from mainspring.v1 import dispatcher_pb2 as pb
from mainspring.v1 import types_pb2

from test_framework.grpc_testing import error_of, violations_of
from test_framework.identities import Identities, unique
from test_framework.waiting import wait_until
from tests.contract.dispatcher_calls import TIMEOUT, Desk, make_call
from tests.contract.dispatcher_calls import tool as declared

pytestmark = pytest.mark.contract
grpc_service = "Dispatcher"
grpc_databases = ("Registry",)


async def cancel(desk: Desk, tenant: str, call_ids: Sequence[str]) -> list[pb.CancelOutcome]:
    request = pb.CancelCallsRequest(tenant_id=tenant, call_ids=call_ids)
    answer = await desk.stub.CancelCalls(request, metadata=desk.identities.service_metadata(), timeout=TIMEOUT)
    assert [outcome.call_id for outcome in answer.outcomes] == list(call_ids)
    return list(answer.outcomes)


async def test_a_cancel_stops_the_coroutine_and_says_how_soon(desk: Desk, tenant: str) -> None:
    events: list[str] = []

    @tool(effect="pure")
    async def work() -> None:
        events.append("began")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            events.append("stopped")
            raise

    async with desk.worker(work, tenant=tenant):
        stream = desk.calls()
        call = make_call("work", tenant=tenant)
        ids = await stream.send(call)
        await wait_until(lambda: events)
        (outcome,) = await cancel(desk, tenant, [call.call_id])
        assert events == ["began", "stopped"]
        assert (outcome.found, outcome.acknowledged) == (True, True)
        assert 0 < outcome.after_ms < 5_000
        (result,) = await stream.outcomes(ids)
    assert (result.status, result.error.code, result.error.reason) == (
        types_pb2.TOOL_STATUS_CANCELLED,
        "CANCELLED",
        "TOOL_CANCELLED",
    )
    assert result.error.metadata["call_id"] == call.call_id


async def test_many_are_cancelled_at_once_and_each_has_its_answer(desk: Desk, tenant: str) -> None:
    async with desk.worker(diagnostics.sleep):
        stream = desk.calls()
        calls = [make_call("diagnostics.sleep", tenant=tenant, arguments=b'{"seconds": 600}') for _ in range(20)]
        ids = await stream.send(*calls)
        unknown = unique("call")
        outcomes = await cancel(desk, tenant, [unknown, *(call.call_id for call in calls)])
        results = await stream.outcomes(ids)
    assert [outcome.found for outcome in outcomes] == [False] + [True] * 20
    assert [outcome.acknowledged for outcome in outcomes] == [False] + [True] * 20
    assert {result.status for result in results} == {types_pb2.TOOL_STATUS_CANCELLED}


async def test_a_thread_that_runs_on_is_not_acknowledged(desk: Desk, tenant: str) -> None:
    began, release = threading.Event(), threading.Event()
    seen: list[bool] = []

    @tool(effect="pure")
    def work(context: ToolContext) -> None:
        began.set()
        release.wait(TIMEOUT)
        seen.append(context.cancelled)

    async with desk.worker(work, tenant=tenant):
        stream = desk.calls()
        call = make_call("work", tenant=tenant)
        ids = await stream.send(call)
        await wait_until(began.is_set)
        async with asyncio.timeout(5.5):
            (outcome,) = await cancel(desk, tenant, [call.call_id])
        assert (outcome.found, outcome.acknowledged) == (True, False)
        (result,) = await stream.outcomes(ids)
        assert result.status == types_pb2.TOOL_STATUS_CANCELLED
        release.set()
    assert seen == [True], "it was asked"


async def test_a_thread_that_heeds_its_context_is_acknowledged(desk: Desk, tenant: str) -> None:
    began = threading.Event()

    @tool(effect="pure")
    def work(context: ToolContext) -> None:
        began.set()
        context.cancel_flag.wait(TIMEOUT)

    async with desk.worker(work, tenant=tenant):
        call = make_call("work", tenant=tenant)
        await desk.calls().send(call)
        await wait_until(began.is_set)
        (outcome,) = await cancel(desk, tenant, [call.call_id])
    assert (outcome.found, outcome.acknowledged) == (True, True)


async def test_another_tenants_call_is_not_found_and_runs_on(desk: Desk, tenant: str) -> None:
    worker = await desk.attached(declared("slow"), tenant=tenant)
    stream = desk.calls()
    call = make_call("slow", tenant=tenant)
    ids = await stream.send(call)
    sent = await worker.next_call()
    (outcome,) = await cancel(desk, unique("tenant"), [call.call_id])
    assert (outcome.found, outcome.acknowledged) == (False, False)
    await worker.finish(sent, b'"done"')
    (result,) = await stream.outcomes(ids)
    assert result.result == b'"done"'
    assert worker.cancelled == []


async def test_a_cancel_may_be_repeated(desk: Desk, tenant: str) -> None:
    async with desk.worker(diagnostics.sleep):
        call = make_call("diagnostics.sleep", tenant=tenant, arguments=b'{"seconds": 600}')
        await desk.calls().send(call)
        await wait_until(lambda: cancel(desk, tenant, [call.call_id]))
        (again,) = await cancel(desk, tenant, [call.call_id])
    assert not again.found


async def test_a_call_in_line_is_cancelled_before_it_runs(desk: Desk, tenant: str) -> None:
    worker = await desk.attached(declared("slow"), tenant=tenant, concurrency=1)
    stream = desk.calls()
    running, waiting = make_call("slow", tenant=tenant), make_call("slow", tenant=tenant)
    ids = await stream.send(running, waiting)
    sent = await worker.next_call()
    (outcome,) = await cancel(desk, tenant, [waiting.call_id])
    assert (outcome.found, outcome.acknowledged) == (True, True)
    await worker.finish(sent)
    results = await stream.outcomes(ids)
    assert [result.status for result in results] == [types_pb2.TOOL_STATUS_OK, types_pb2.TOOL_STATUS_CANCELLED]
    assert worker.calls == []


async def test_an_asker_that_gives_up_or_goes_away_changes_nothing(desk: Desk, tenant: str) -> None:
    worker = await desk.attached(declared("slow"), tenant=tenant)
    stream = desk.calls()
    call = make_call("slow", tenant=tenant)
    ids = await stream.send(call)
    sent = await worker.next_call()
    request = pb.CancelCallsRequest(tenant_id=tenant, call_ids=[call.call_id])
    metadata = desk.identities.service_metadata()
    with pytest.raises(grpc.RpcError) as raised:
        await desk.stub.CancelCalls(request, metadata=metadata, timeout=0.3)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    asked = desk.stub.CancelCalls(request, metadata=metadata, timeout=TIMEOUT)
    await worker.until(lambda: len(worker.cancelled) == 2)
    asked.cancel()
    done = pb.WorkerResult(dispatch_id=sent.dispatch_id, status=types_pb2.TOOL_STATUS_CANCELLED)
    done.error.code, done.error.reason, done.error.message = "CANCELLED", "TOOL_CANCELLED", "It was cancelled."
    await worker.stream.write(pb.AttachRequest(results=[done]))
    (result,) = await stream.outcomes(ids)
    assert result.status == types_pb2.TOOL_STATUS_CANCELLED


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.CancelCallsRequest(call_ids=["c"]), "tenant_id"),
        (pb.CancelCallsRequest(tenant_id="acme"), "call_ids"),
        (pb.CancelCallsRequest(tenant_id="acme", call_ids=["c"] * 257), "call_ids"),
    ],
)
async def test_a_malformed_request_names_its_field(desk: Desk, request_: pb.CancelCallsRequest, field: str) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        await desk.stub.CancelCalls(request_, metadata=desk.identities.service_metadata(), timeout=TIMEOUT)
    assert error_of(raised.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
    assert field in violations_of(raised.value)


async def test_only_services_may_cancel(desk: Desk, identities: Identities, tenant: str) -> None:
    request = pb.CancelCallsRequest(tenant_id=tenant, call_ids=["c"])
    with pytest.raises(grpc.RpcError) as raised:
        await desk.stub.CancelCalls(request, metadata=identities.metadata(tenant, "ann", "admin"), timeout=TIMEOUT)
    assert error_of(raised.value)[:2] == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED")
