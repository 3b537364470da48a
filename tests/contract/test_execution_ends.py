"""How runs end over the real services: cancelled with receipts, out of time, failed for a clear reason."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import grpc
import orjson
import pytest
from mainspring.v1 import execution_pb2 as pb
from mainspring.v1 import types_pb2
from mainspring_kit.identity import new_id

from test_framework.agents import call, scripted_agent, step
from test_framework.grpc_testing import error_of
from test_framework.servers import Database
from test_framework.waiting import wait_until
from tests.contract.execution_platform import Caller, names, terminal

pytestmark = pytest.mark.contract

grpc_service = "Execution"
grpc_databases = ("State", "Registry")

QUEUED = types_pb2.RUN_STATE_QUEUED
FAILED, CANCELLED = types_pb2.RUN_STATE_FAILED, types_pb2.RUN_STATE_CANCELLED
COMPLETED, TIMED_OUT = types_pb2.RUN_STATE_COMPLETED, types_pb2.RUN_STATE_TIMED_OUT

SLEEP = step("I will sleep.", call("diagnostics.sleep", seconds=60))
DONE = step("Done.", result={"answer": 1})


# Any: servicers and settings have no common base.
async def cancel(caller: Caller, run_id: str, **fields: str) -> pb.CancelRunResponse:
    answer: pb.CancelRunResponse = await caller.execution.CancelRun(
        pb.CancelRunRequest(run_id=run_id, **fields), **caller.options()
    )
    return answer


async def test_a_cancel_reaches_the_tool_and_leaves_a_receipt(ann: Caller) -> None:
    await ann.register(scripted_agent("sleepy", SLEEP, DONE))
    started = await ann.start("sleepy")
    await ann.reached(started.run_id, "tool_executing")
    request_id = new_id()
    assert (await cancel(ann, started.run_id, reason="enough", request_id=request_id)).run_id == started.run_id
    await cancel(ann, started.run_id, reason="enough", request_id=request_id)
    run = await ann.end_of(started.run_id)
    events = await ann.log(started.run_id)
    assert run.state == CANCELLED
    assert names(events)[-3:] == ["tool_executing", "tool_completed", "agent_cancelled"]
    assert events[-2].tool_completed.status == types_pb2.TOOL_STATUS_CANCELLED
    end = terminal(events)
    assert (end.requested_by, end.reason) == (ann.user_id, "enough")
    assert [(receipt.call_id, receipt.acknowledged) for receipt in end.receipt] == [(f"{run.run_id}.2.0", True)]
    assert 0 < end.receipt[0].after_ms < 5_000


async def test_a_cancel_reaches_a_thinking_model(ann: Caller) -> None:
    await ann.register(scripted_agent("slow", step("Slowly.", delay="60s", result=1)))
    started = await ann.start("slow")
    await cancel(ann, started.run_id)
    assert (await ann.end_of(started.run_id)).state == CANCELLED
    assert names(await ann.log(started.run_id)) == ["agent_started", "agent_cancelled"]


async def test_a_queued_run_is_cancelled_before_its_turn(ann: Caller) -> None:
    await ann.register(scripted_agent("sleepy", SLEEP, DONE))
    first = await ann.start("sleepy", session_id="line")
    second = await ann.start("sleepy", session_id="line")
    assert second.state == QUEUED
    await cancel(ann, second.run_id)
    assert (await ann.end_of(second.run_id)).state == CANCELLED
    events = await ann.log(second.run_id)
    assert (names(events), terminal(events).duration_ms) == (["agent_cancelled"], 0)
    await cancel(ann, first.run_id)
    assert (await ann.end_of(first.run_id)).state == CANCELLED


async def test_only_the_owner_can_cancel_and_only_what_goes_on(ann: Caller) -> None:
    run = await ann.run("echo", 1)
    for caller, run_id, reason in (
        (ann, run.run_id, "RUN_ENDED"),
        (ann.other_user(), run.run_id, "RUN_NOT_FOUND"),
        (ann, new_id(), "RUN_NOT_FOUND"),
        (ann, "no-uuid", "RUN_NOT_FOUND"),
        (ann, "", "RUN_NOT_FOUND"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await cancel(caller, run_id)
        assert error_of(raised.value).reason == reason


async def test_a_run_past_its_deadline_stops_its_tool(ann: Caller) -> None:
    await ann.register(scripted_agent("hasty", SLEEP, DONE, limits={"timeout": "2s"}))
    run = await ann.run("hasty")
    events = await ann.log(run.run_id)
    assert (run.state, run.error.reason, run.error.code) == (TIMED_OUT, "RUN_TIMED_OUT", "DEADLINE_EXCEEDED")
    assert run.error.metadata == {"run_id": run.run_id, "timeout_seconds": "2"}
    assert names(events)[-2:] == ["tool_completed", "agent_timed_out"]
    assert events[-2].tool_completed.status == types_pb2.TOOL_STATUS_CANCELLED
    assert 1_900 <= terminal(events).duration_ms < 10_000  # its time runs from the start request
    assert [stage.name for stage in run.stages] == [
        "initialization",
        "preprocessing",
        "core_execution",
        "postprocessing",
        "completion",
    ]


async def test_a_run_that_waits_in_line_past_its_deadline_never_begins(ann: Caller) -> None:
    await ann.register(scripted_agent("sleepy", SLEEP, DONE))
    await ann.register(scripted_agent("hasty", DONE, limits={"timeout": "400ms"}))
    first = await ann.start("sleepy", session_id="line")
    run = await ann.run("hasty", session_id="line")
    assert (run.state, names(await ann.log(run.run_id))) == (TIMED_OUT, ["agent_timed_out"])
    await cancel(ann, first.run_id)
    await ann.end_of(first.run_id)


@pytest.mark.parametrize(
    ("steps", "more", "reason", "metadata"),
    [
        ([step("Hm.")] * 3, {"limits": {"max_steps": 2}}, "STEPS_EXHAUSTED", {"max_steps": "2"}),
        ([step("Hm.")], {}, "MODEL_FAILED", {"provider": "scripted", "step": "2"}),
        ([DONE], {"output_schema": {"required": ["x"]}}, "RESULT_INVALID", {"path": "$"}),
        ([step("Hm.", result="{{input.gone}}")], {}, "TEMPLATE_INVALID", {"expression": "input.gone"}),
        (
            [step("Hm."), step("Broken.", fail={"code": "INTERNAL", "message": "out of order"})],
            {},
            "MODEL_FAILED",
            {"provider": "scripted", "step": "2"},
        ),
    ],
)
async def test_a_run_fails_for_a_clear_reason(
    ann: Caller, steps: list[Any], more: dict[str, Any], reason: str, metadata: dict[str, str]
) -> None:
    await ann.register(scripted_agent("failing", *steps, **more))
    run = await ann.run("failing", 1)
    end = terminal(await ann.log(run.run_id))
    assert (run.state, run.error.reason) == (FAILED, reason)
    assert end.error == run.error
    assert metadata.items() <= dict(run.error.metadata).items()
    assert all(stage.duration_ms > 0 for stage in run.stages)


async def test_a_model_that_is_unavailable_twice_is_asked_a_third_time(ann: Caller) -> None:
    failing = step("At last.", result=1, fail={"code": "UNAVAILABLE", "message": "busy", "times": 2})
    await ann.register(scripted_agent("flaky", failing))
    assert (await ann.run("flaky")).state == COMPLETED


async def test_a_failed_tool_is_an_outcome_and_its_missing_result_the_runs_error(ann: Caller) -> None:
    fail = call("diagnostics.fail", code="INVALID_ARGUMENT", message="line 17 is no number")
    tolerant = step("It failed.", result={"status": "{{calls[0].status}}", "why": "{{calls[0].error.message}}"})
    await ann.register(scripted_agent("tolerant", step("Try.", fail), tolerant))
    await ann.register(scripted_agent("strict", step("Try.", fail), step("So.", result="{{calls[0].result}}")))
    run = await ann.run("tolerant")
    assert orjson.loads(run.result) == {"status": "error", "why": "line 17 is no number"}
    run = await ann.run("strict")
    assert (run.state, run.error.code, run.error.reason) == (FAILED, "INVALID_ARGUMENT", "TOOL_FAILED")
    assert run.error.message == "line 17 is no number"


async def test_calls_of_a_step_are_made_at_once_and_each_outcome_is_told_when_it_comes(ann: Caller) -> None:
    both = step("Both.", call("diagnostics.sleep", seconds=60), call("diagnostics.echo", value=1))
    await ann.register(scripted_agent("pair", both, DONE))
    started = await ann.start("pair")
    events = await ann.reached(started.run_id, "tool_completed")
    assert names(events)[2:] == ["tool_executing", "tool_executing", "tool_completed"]
    assert events[-1].tool_completed.tool == "diagnostics.echo"
    await cancel(ann, started.run_id)
    await ann.end_of(started.run_id)
    events = await ann.log(started.run_id)
    closed = [event.tool_completed.call_id for event in events if event.HasField("tool_completed")]
    assert sorted(closed) == [f"{started.run_id}.2.0", f"{started.run_id}.2.1"]


@asynccontextmanager
async def refused_by_the_database(
    database: Database, condition: str, *, table: str = "state.runs"
) -> AsyncIterator[None]:
    """While the block runs the database refuses rows that do not meet the condition."""
    connection = await asyncpg.connect(database.owner_url)
    try:
        await connection.execute(f"ALTER TABLE {table} ADD CONSTRAINT probe CHECK ({condition}) NOT VALID")
        yield
    finally:
        await connection.execute(f"ALTER TABLE {table} DROP CONSTRAINT probe")
        await connection.close()


async def test_a_result_that_the_database_refuses_ends_the_run_without_it(
    ann: Caller, contract_databases: Mapping[str, Database]
) -> None:
    condition = "result IS NULL OR position('forbidden'::bytea IN result) = 0"
    async with refused_by_the_database(contract_databases["State"], condition):
        run = await ann.run("echo", "forbidden")
        other = await ann.run("echo", "allowed")
    events = await ann.log(run.run_id)
    assert (run.state, run.error.reason, run.result) == (FAILED, "EVENT_REFUSED", b"")
    assert names(events)[-2:] == ["tool_completed", "agent_failed"]
    assert events[-2].tool_completed.error.reason == "EVENT_REFUSED"
    assert all(b"forbidden" not in event.SerializeToString() for event in events[3:])
    assert other.state == COMPLETED


@pytest.mark.parametrize("kind", ["agent_thinking", "tool_executing", "tool_completed", "agent_completed"])
async def test_an_event_that_the_database_refuses_ends_its_run_alone(
    ann: Caller, contract_databases: Mapping[str, Database], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    condition = f"type <> '{kind}' OR position('forbidden'::bytea IN event) = 0"
    async with (
        refused_by_the_database(contract_databases["State"], condition, table="state.events"),
        asyncio.TaskGroup() as tasks,
    ):
        refused = [tasks.create_task(ann.run("echo", "forbidden")) for _ in range(8)]
        taken = [tasks.create_task(ann.run("echo", "allowed")) for _ in range(8)]
    assert {task.result().error.reason for task in refused} == {"EVENT_REFUSED"}
    for task in refused:
        events = await ann.log(task.result().run_id)
        intended = [event.tool_executing.call_id for event in events if event.HasField("tool_executing")]
        closed = [event.tool_completed.call_id for event in events if event.HasField("tool_completed")]
        assert set(intended) <= set(closed) or kind == "tool_completed"
    assert {task.result().state for task in taken} == {COMPLETED}
    assert "run_faulted" not in caplog.text


async def test_a_run_whose_end_is_refused_again_and_again_ends_once_it_can(
    ann: Caller, contract_databases: Mapping[str, Database], caplog: pytest.LogCaptureFixture
) -> None:
    await ann.register(scripted_agent("cursed", DONE))
    condition = "type NOT IN ('agent_completed', 'agent_failed') OR position('cursed'::bytea IN event) = 0"
    async with refused_by_the_database(contract_databases["State"], condition, table="state.events"):
        started = await ann.start("cursed")
        await wait_until(lambda: "run_set_aside" in caplog.text)
    run = await ann.end_of(started.run_id)
    assert (run.state, run.error.reason, run.epoch) == (FAILED, "EVENT_REFUSED", 1)
