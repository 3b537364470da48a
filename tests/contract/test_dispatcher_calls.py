"""CallTools over the wire: each item is answered once with an outcome, whatever becomes of its tool."""

from __future__ import annotations

from typing import Any

import grpc
import orjson
import pytest
from mainspring import diagnostics
from mainspring.tool import ToolContext, tool
from mainspring.v1 import dispatcher_pb2 as pb
from mainspring.v1 import types_pb2

from test_framework.grpc_testing import error_of
from test_framework.identities import Identities, unique
from tests.contract.dispatcher_calls import OK, TIMEOUT, UNSAFE, Desk, make_call
from tests.contract.dispatcher_calls import tool as declared

pytestmark = pytest.mark.contract
grpc_service = "Dispatcher"
grpc_databases = ("Registry",)


@tool(effect="pure")
async def whoami(context: ToolContext) -> dict[str, Any]:
    return {
        "tenant": context.tenant_id,
        "user": context.user_id,
        "session": context.session_id,
        "run": context.run_id,
        "call": context.call_id,
        "attempt": context.attempt,
    }


@tool(effect="pure")
async def measure(text: str) -> int:
    return len(text)


@tool(effect="pure")
async def inflate(size: int) -> str:
    return "x" * size


async def test_a_call_runs_in_a_worker_as_its_user(desk: Desk, tenant: str) -> None:
    async with desk.worker(whoami, tenant=tenant):
        call = make_call("whoami", tenant=tenant)
        result = await desk.calls().ask_one(call)
    assert (result.status, result.call_id, result.attempts, result.cached) == (OK, call.call_id, 1, False)
    assert orjson.loads(result.result) == {
        "tenant": tenant,
        "user": call.context.user_id,
        "session": call.context.session_id,
        "run": call.context.run_id,
        "call": call.call_id,
        "attempt": 1,
    }
    assert result.duration_ms > 0


async def test_many_calls_of_many_users_share_a_stream(desk: Desk) -> None:
    async with desk.worker(diagnostics.echo):
        calls = [
            make_call("diagnostics.echo", tenant=unique("tenant"), arguments=b'{"n": %d}' % number)
            for number in range(1_000)
        ]
        stream = desk.calls()
        ids = [item_id for start in range(0, 1_000, 250) for item_id in await stream.send(*calls[start : start + 250])]
        results = await stream.outcomes(ids)
    assert [result.result for result in results] == [b'{"n":%d}' % number for number in range(1_000)]


async def test_an_unknown_tool_is_not_found(desk: Desk, tenant: str) -> None:
    result = await desk.calls().ask_one(make_call("no.such.tool", tenant=tenant))
    assert (result.status, result.error.code, result.error.reason) == (
        types_pb2.TOOL_STATUS_ERROR,
        "NOT_FOUND",
        "TOOL_NOT_FOUND",
    )
    assert dict(result.error.metadata) == {"tool": "no.such.tool"}


async def test_a_tool_that_nobody_serves_now_is_unavailable(desk: Desk, tenant: str) -> None:
    worker = await desk.attached(declared("left.alone"), tenant=tenant)
    await worker.leave()
    result = await desk.calls().ask_one(make_call("left.alone", tenant=tenant))
    assert (result.error.code, result.error.reason) == ("UNAVAILABLE", "WORKER_UNAVAILABLE")
    assert dict(result.error.metadata) == {"tool": "left.alone"}


async def test_a_foreign_tenants_tool_is_not_found_and_never_sees_the_call(desk: Desk, tenant: str) -> None:
    foreign = await desk.attached(declared("their.tool"), tenant=unique("tenant"))
    result = await desk.calls().ask_one(make_call("their.tool", tenant=tenant))
    assert result.error.reason == "TOOL_NOT_FOUND"
    await foreign.leave()
    assert foreign.calls == []


async def test_a_tenants_own_tool_wins_over_the_shared_one(desk: Desk, tenant: str) -> None:
    name = f"tool.{unique('own')}"
    shared = await desk.attached(declared(name))
    own = await desk.attached(declared(name), tenant=tenant)
    stream = desk.calls()
    mine, others = await stream.send(make_call(name, tenant=tenant), make_call(name, tenant=unique("tenant")))
    await own.finish(await own.next_call(), b'"own"')
    await shared.finish(await shared.next_call(), b'"shared"')
    results = await stream.outcomes([mine, others])
    assert [result.result for result in results] == [b'"own"', b'"shared"']


async def test_malformed_items_are_answered_one_by_one(desk: Desk, tenant: str) -> None:
    blank, large, nameless = (make_call("measure", tenant=tenant, arguments=b'{"text":""}') for _ in range(3))
    blank.context.user_id = ""
    large.arguments = b'{"text":"' + b"x" * (1 << 20) + b'"}'
    nameless.tool = ""
    good = make_call("measure", tenant=tenant, arguments=b'{"text":"four"}')
    wrong = make_call("measure", tenant=tenant, arguments=b'{"text":4}')
    async with desk.worker(measure, tenant=tenant):
        results = await desk.calls().ask(blank, large, nameless, good, wrong)
    assert [result.error.reason for result in results] == [
        "CONTEXT_INVALID",
        "PAYLOAD_TOO_LARGE",
        "REQUEST_INVALID",
        "",
        "TOOL_ARGUMENTS_INVALID",
    ]
    assert results[3].result == b"4"
    assert dict(results[4].error.metadata) == {"tool": "measure", "path": "text"}


async def test_a_repeated_call_under_way_runs_once(desk: Desk, tenant: str) -> None:
    worker = await desk.attached(declared("slow"), tenant=tenant)
    first, second = desk.calls(), desk.calls()
    call = make_call("slow", tenant=tenant)
    ids = await first.send(call)
    sent = await worker.next_call()
    ids_again = await second.send(call)
    await second.ask_one(make_call("no.such.tool", tenant=tenant))  # so that the repeated call has arrived
    await worker.finish(sent, b'"once"')
    for stream, wanted in ((first, ids), (second, ids_again)):
        assert [result.result for result in await stream.outcomes(wanted)] == [b'"once"']
    assert worker.calls == []


async def test_a_broken_stream_cancels_nothing_and_sending_again_gets_the_outcome(desk: Desk, tenant: str) -> None:
    worker = await desk.attached(declared("pay", effect=UNSAFE), tenant=tenant)
    call = make_call("pay", tenant=tenant, effect=UNSAFE)
    broken = desk.calls()
    await broken.send(call)
    sent = await worker.next_call()
    broken.call.cancel()
    stream = desk.calls()
    await stream.ask_one(make_call("no.such.tool", tenant=tenant))
    await worker.finish(sent, b'"paid"')
    assert (await stream.ask_one(call)).result == b'"paid"'
    assert (worker.calls, worker.cancelled) == ([], [])


async def test_a_call_out_of_time_is_answered_and_its_worker_told(desk: Desk, tenant: str) -> None:
    worker = await desk.attached(declared("slow"), tenant=tenant)
    stream = desk.calls()
    ids = await stream.send(make_call("slow", tenant=tenant, seconds=0.3))
    sent = await worker.next_call()
    assert 0 < sent.timeout.ToMilliseconds() <= 300
    (result,) = await stream.outcomes(ids)
    assert (result.status, result.error.code, result.error.reason) == (
        types_pb2.TOOL_STATUS_TIMED_OUT,
        "DEADLINE_EXCEEDED",
        "TOOL_TIMED_OUT",
    )
    await worker.until(lambda: worker.cancelled)
    assert worker.cancelled == [sent.dispatch_id]


async def test_a_failing_tool_is_an_outcome_and_the_next_call_works(desk: Desk, tenant: str) -> None:
    arguments = b'{"code": "FAILED_PRECONDITION", "message": "Not today.", "times": 1}'
    call = make_call("diagnostics.fail", tenant=tenant, arguments=arguments)
    again = make_call("diagnostics.fail", tenant=tenant, arguments=arguments)
    again.context.CopyFrom(call.context)
    async with desk.worker(diagnostics.fail):
        stream = desk.calls()
        first, second = await stream.ask_one(call), await stream.ask_one(again)
    assert (first.error.code, first.error.reason, first.error.message) == (
        "FAILED_PRECONDITION",
        "TOOL_FAILED",
        "Not today.",
    )
    assert (second.status, second.result) == (OK, b'{"failed":1}')


async def test_a_result_may_have_16_mib_and_no_more(desk: Desk, tenant: str) -> None:
    fits, bursts = (16 << 20) - 2, (16 << 20) - 1
    async with desk.worker(inflate, tenant=tenant):
        stream = desk.calls()
        good = await stream.ask_one(make_call("inflate", tenant=tenant, arguments=b'{"size": %d}' % fits))
        bad = await stream.ask_one(make_call("inflate", tenant=tenant, arguments=b'{"size": %d}' % bursts))
    assert (good.status, len(good.result)) == (OK, 16 << 20)
    assert (bad.error.code, bad.error.reason) == ("RESOURCE_EXHAUSTED", "PAYLOAD_TOO_LARGE")


async def test_more_unanswered_calls_than_the_credit_end_the_stream(desk: Desk, tenant: str) -> None:
    await desk.attached(declared("slow"), tenant=tenant)
    stream = desk.calls()
    for _ in range(17):
        await stream.send(*(make_call("slow", tenant=tenant, seconds=5) for _ in range(500)))
    with pytest.raises(grpc.RpcError) as raised:
        while await stream.call.read():
            pass
    assert error_of(raised.value).reason == "QUEUE_FULL"


async def test_only_services_may_call(desk: Desk, identities: Identities, tenant: str) -> None:
    for metadata, reason in (
        ((), "TOKEN_MISSING"),
        (identities.metadata(tenant, "ann", "admin"), "ROLE_REQUIRED"),
    ):
        call = desk.stub.CallTools(metadata=metadata)
        with pytest.raises(grpc.RpcError) as raised:
            await call.read()
        assert error_of(raised.value).reason == reason


async def test_what_comes_later_says_so(desk: Desk, identities: Identities, tenant: str) -> None:
    metadata = identities.metadata(tenant, "ann", "operator")
    for method, request in (
        (desk.stub.ListCircuits, pb.ListCircuitsRequest()),
        (desk.stub.ResetCircuit, pb.ResetCircuitRequest()),
        (desk.stub.InvalidateCache, pb.InvalidateCacheRequest()),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            await method(request, metadata=metadata, timeout=TIMEOUT)
        assert error_of(raised.value)[:2] == (grpc.StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED")


async def test_a_call_that_ends_while_its_caller_is_away_waits_for_nobody(desk: Desk, tenant: str) -> None:
    worker = await desk.attached(declared("slow"), tenant=tenant, concurrency=1)
    broken = desk.calls()
    await broken.send(make_call("slow", tenant=tenant))
    sent = await worker.next_call()
    broken.call.cancel()
    stream = desk.calls()
    ids = await stream.send(make_call("slow", tenant=tenant))
    await worker.finish(sent)
    await worker.finish(await worker.next_call(), b"2")
    assert [result.result for result in await stream.outcomes(ids)] == [b"2"]
