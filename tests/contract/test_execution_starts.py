"""StartRun and StartRuns over a real wire with the real services behind: what is started, refused, repeated, queued."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import orjson
import pytest
from mainspring.v1 import execution_pb2 as pb
from mainspring.v1 import state_pb2, types_pb2
from mainspring_kit.errors import from_status

from test_framework.agents import call, scripted_agent, step
from test_framework.grpc_testing import error_of, violations_of
from test_framework.identities import make_context, unique
from tests.contract.execution_platform import Caller, names, terminal

pytestmark = pytest.mark.contract

grpc_service = "Execution"
grpc_databases = ("State", "Registry")

RUNNING, QUEUED = types_pb2.RUN_STATE_RUNNING, types_pb2.RUN_STATE_QUEUED
COMPLETED, FAILED = types_pb2.RUN_STATE_COMPLETED, types_pb2.RUN_STATE_FAILED


# Any: servicers and settings have no common base.
async def test_a_run_goes_through_its_five_events(ann: Caller) -> None:
    started = await ann.start("echo", "héllo", session_id="talk-1")
    assert started.state == RUNNING
    run = await ann.end_of(started.run_id)
    assert (run.state, orjson.loads(run.result), run.session_id, run.ordinal) == (
        COMPLETED,
        {"answer": "héllo"},
        "talk-1",
        1,
    )
    events = await ann.log(run.run_id)
    assert names(events) == [
        "agent_started",
        "agent_thinking",
        "tool_executing",
        "tool_completed",
        "agent_thinking",
        "agent_completed",
    ]
    assert orjson.loads(events[0].agent_started.input) == {"value": "héllo"}
    assert events[1].agent_thinking.planned_calls[0].call_id == f"{run.run_id}.2.0"
    assert orjson.loads(events[2].tool_executing.arguments) == {"value": "héllo"}
    assert (events[2].tool_executing.effect, events[3].tool_completed.status) == (
        types_pb2.EFFECT_CLASS_PURE,
        types_pb2.TOOL_STATUS_OK,
    )
    assert {event.trace_id for event in events} == {run.trace_id}


async def test_the_five_stages_are_stored_and_none_is_empty(ann: Caller) -> None:
    run = await ann.run("echo", 1)
    assert [stage.name for stage in run.stages] == [
        "initialization",
        "preprocessing",
        "core_execution",
        "postprocessing",
        "completion",
    ]
    assert all(stage.duration_ms > 0 for stage in run.stages)
    end = terminal(await ann.log(run.run_id))
    assert sum(stage.duration_ms for stage in end.stages[1:]) == pytest.approx(end.duration_ms, abs=0.1)
    assert run.usage.output_tokens > 0


async def test_wait_answers_with_the_ended_run(ann: Caller) -> None:
    request = pb.StartRunRequest(agent="echo", input=b'{"value":[1,2]}')
    request.wait.FromSeconds(10)
    answer = await ann.execution.StartRun(request, **ann.options())
    assert (answer.state, orjson.loads(answer.run.result)) == (COMPLETED, {"answer": [1, 2]})


async def test_wait_ends_before_the_run_does(ann: Caller) -> None:
    await ann.register(scripted_agent("slow", step("Slowly.", delay="30s", result=1)))
    request = pb.StartRunRequest(agent="slow")
    request.wait.FromMilliseconds(100)
    answer = await ann.execution.StartRun(request, **ann.options())
    assert (answer.state, answer.run.state) == (RUNNING, RUNNING)
    await ann.execution.CancelRun(pb.CancelRunRequest(run_id=answer.run_id), **ann.options())


async def test_an_unknown_agent_version_or_foreign_tenant_is_not_found(ann: Caller) -> None:
    stranger = Caller(unique("tenant"), ann.user_id, ann.identities, ann.channel)
    for caller, request, reason in (
        (ann, pb.StartRunRequest(agent="nobody"), "AGENT_NOT_FOUND"),
        (stranger, pb.StartRunRequest(agent="echo"), "AGENT_NOT_FOUND"),
        (ann, pb.StartRunRequest(agent="echo", version="99"), "VERSION_NOT_FOUND"),
        (ann, pb.StartRunRequest(agent="echo", alias="canary"), "VERSION_NOT_FOUND"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await caller.execution.StartRun(request, **caller.options())
        assert error_of(raised.value)[:2] == (grpc.StatusCode.NOT_FOUND, reason)


async def test_a_malformed_start_is_refused_with_its_fields(ann: Caller) -> None:
    for request, field in (
        (pb.StartRunRequest(), "agent"),
        (pb.StartRunRequest(agent="echo", idempotency_key="k" * 129), "idempotency_key"),
        (pb.StartRunRequest(agent="echo", input=b"{not json"), "start.input"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await ann.execution.StartRun(request, **ann.options())
        assert error_of(raised.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID")
        assert list(violations_of(raised.value)) == [field]


async def test_a_start_needs_a_token_and_a_role(ann: Caller) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await ann.execution.StartRun(pb.StartRunRequest(agent="echo"), timeout=5)
    assert error_of(raised.value)[:2] == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await ann.execution.StartRun(pb.StartRunRequest(agent="echo"), **ann.options("viewer"))
    assert error_of(raised.value)[:2] == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await ann.execution.StartRuns(iter(()), **ann.options("admin")).read()
    assert error_of(raised.value)[:2] == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED")


async def test_a_start_past_its_deadline_or_cancelled_by_its_caller_leaves_no_half_run(ann: Caller) -> None:
    options = {**ann.options(), "timeout": 0}
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await ann.execution.StartRun(pb.StartRunRequest(agent="echo"), **options)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    calling = ann.execution.StartRun(pb.StartRunRequest(agent="echo", session_id="left"), **ann.options())
    await asyncio.sleep(0)
    calling.cancel()
    listed = await ann.state.ListRuns(state_pb2.ListRunsRequest(session_id="left"), **ann.options())
    for run in listed.runs:
        assert (await ann.end_of(run.run_id)).state == COMPLETED


async def test_an_idempotency_key_starts_one_run(ann: Caller) -> None:
    first = await ann.start("echo", 1, idempotency_key="once")
    again = await ann.start("echo", 1, idempotency_key="once")
    assert again.run_id == first.run_id
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await ann.start("echo", 2, idempotency_key="once")
    error = error_of(raised.value)
    assert error[:2] == (grpc.StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_KEY_REUSED")
    assert error.metadata == {"idempotency_key": "once", "run_id": first.run_id}
    other = await ann.other_user().start("echo", 1, idempotency_key="once")
    assert other.run_id != first.run_id
    assert names(await ann.log(first.run_id)).count("agent_started") == 1


async def test_a_session_runs_one_after_the_other(ann: Caller) -> None:
    await ann.register(
        scripted_agent("brief", step("A moment.", delay="300ms"), step("Done.", result="{{input.value}}"))
    )
    started = [await ann.start("brief", number, session_id="line") for number in range(3)]
    assert [answer.state for answer in started] == [RUNNING, QUEUED, QUEUED]
    runs = [await ann.end_of(answer.run_id) for answer in started]
    assert [(run.state, run.ordinal, orjson.loads(run.result)) for run in runs] == [
        (COMPLETED, 1, 0),
        (COMPLETED, 2, 1),
        (COMPLETED, 3, 2),
    ]
    assert runs[0].end_time.ToNanoseconds() <= runs[1].start_time.ToNanoseconds()
    logs = [await ann.log(run.run_id) for run in runs]
    assert [names(log)[0] for log in logs] == ["agent_started"] * 3
    assert [log[0].agent_started.ordinal for log in logs] == [1, 2, 3]
    assert all("run_recovered" not in names(log) for log in logs)


async def test_a_run_sees_the_earlier_runs_of_its_session(ann: Caller) -> None:
    await ann.register(scripted_agent("remember", step("So far.", result={"saw": "{{session.history}}"})))
    await ann.run("echo", "first", session_id="talk")
    await ann.other_user().run("echo", "secret", session_id="talk")
    second = await ann.run("remember", "second", session_id="talk")
    third = await ann.run("remember", "third", session_id="talk")
    saw = [[entry["input"]["value"] for entry in orjson.loads(run.result)["saw"]] for run in (second, third)]
    assert saw == [["first"], ["first", "second"]]
    assert orjson.loads(second.result)["saw"][0]["result"] == {"answer": "first"}


async def test_a_batch_is_answered_item_by_item(ann: Caller) -> None:
    contexts = [make_context(ann.tenant_id) for _ in range(3)]
    echo = pb.StartRunRequest(agent="echo", input=b'{"value":1}')
    items = [
        pb.StartItem(item_id=1, context=contexts[0].to_message(), start=echo),
        pb.StartItem(item_id=2, context=contexts[1].to_message(), start=pb.StartRunRequest(agent="nobody")),
        pb.StartItem(item_id=3, start=echo),
        pb.StartItem(item_id=4, context=contexts[2].to_message(), start=pb.StartRunRequest(agent="echo", input=b"{")),
        # The same item sent again, as after a broken stream.
        pb.StartItem(item_id=5, context=contexts[0].to_message(), start=echo),
    ]
    results = await start_all(ann, items)
    reasons = {
        number: from_status(result.status).reason_name for number, result in results.items() if result.status.code
    }
    assert reasons == {2: "AGENT_NOT_FOUND", 3: "CONTEXT_INVALID", 4: "REQUEST_INVALID"}
    assert results[1].run_id == results[5].run_id == contexts[0].run_id
    owner = Caller(ann.tenant_id, contexts[0].user_id, ann.identities, ann.channel)
    assert (await owner.end_of(contexts[0].run_id)).state == COMPLETED
    assert names(await owner.log(contexts[0].run_id)).count("agent_thinking") == 2


async def test_a_run_id_of_somebody_else_tells_nothing(ann: Caller) -> None:
    mine = await ann.run("echo", "secret")
    context = make_context(ann.tenant_id).to_message()
    context.run_id = mine.run_id
    results = await start_all(ann, [pb.StartItem(item_id=1, context=context, start=pb.StartRunRequest(agent="echo"))])
    assert from_status(results[1].status).reason_name == "RUN_EXISTS"
    assert results[1].run_id == ""


async def test_many_runs_at_once_all_end_gapless(ann: Caller) -> None:
    contexts = [make_context(ann.tenant_id) for _ in range(100)]
    items = [
        pb.StartItem(
            item_id=number,
            context=context.to_message(),
            start=pb.StartRunRequest(agent="echo", input=orjson.dumps({"value": context.user_id})),
        )
        for number, context in enumerate(contexts, start=1)
    ]
    results = await start_all(ann, items)
    assert all(result.status.code == 0 and result.state == RUNNING for result in results.values())
    for context in contexts:
        owner = Caller(ann.tenant_id, context.user_id, ann.identities, ann.channel)
        run = await owner.end_of(context.run_id)
        assert orjson.loads(run.result) == {"answer": context.user_id}
        assert len(await owner.log(context.run_id)) == 6


async def test_a_keyed_call_takes_effect_once(ann: Caller, tmp_path: Any) -> None:
    file = str(tmp_path / "effects")
    await ann.register(
        scripted_agent(
            "counter",
            step("Count.", call("diagnostics.count", file="{{input.value}}", name="n")),
            step("Done.", result=1),
        )
    )
    run = await ann.run("counter", file)
    assert run.state == COMPLETED
    assert (tmp_path / "effects").read_text() == f"n {run.run_id}.2.0\n"


async def start_all(caller: Caller, items: list[pb.StartItem]) -> dict[int, pb.StartResult]:
    """Sends items in one frame, as the gateway does, and gathers the answers."""
    stream = caller.execution.StartRuns(metadata=caller.identities.service_metadata(), timeout=20)
    await stream.write(pb.StartRunsRequest(starts=items))
    await stream.done_writing()
    return {result.item_id: result async for frame in stream for result in frame.results}
