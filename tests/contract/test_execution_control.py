"""Runs that are paused, resumed and told what an unsafe call did: asked at any time, done once or refused clearly."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import orjson
import pytest
from mainspring.v1 import execution_pb2 as pb
from mainspring.v1 import state_pb2, types_pb2
from mainspring_execution.config import ExecutionSettings
from mainspring_kit.identity import new_id

from test_framework.agents import call, scripted_agent, step
from test_framework.gate import Gate
from test_framework.grpc_testing import error_of
from test_framework.rows import Rows
from test_framework.servers import Database
from test_framework.waiting import wait_until
from tests.contract.execution_platform import Caller, names, terminal
from tests.contract.test_execution_recovery import doomed, settings, start_on

__all__ = ["settings"]

pytestmark = pytest.mark.contract

grpc_service = "Execution"
grpc_databases = ("State", "Registry")

COMPLETED, CANCELLED = types_pb2.RUN_STATE_COMPLETED, types_pb2.RUN_STATE_CANCELLED
WAITING, PAUSED = types_pb2.RUN_STATE_WAITING, types_pb2.RUN_STATE_PAUSED
ALLOW, DENY = types_pb2.APPROVAL_DECISION_ALLOW, types_pb2.APPROVAL_DECISION_DENY
DONE = step("Done.", result={"calls": "{{calls}}"})
LAUNCH = call("probe.launch", folder="{{input.value}}")


async def pause(caller: Caller, run_id: str, **fields: str) -> None:
    await caller.execution.PauseRun(pb.PauseRunRequest(run_id=run_id, **fields), **caller.options())


async def resume(caller: Caller, run_id: str, **fields: str) -> None:
    await caller.execution.ResumeRun(pb.ResumeRunRequest(run_id=run_id, **fields), **caller.options())


async def cancel(caller: Caller, run_id: str) -> None:
    await caller.execution.CancelRun(pb.CancelRunRequest(run_id=run_id), **caller.options())


async def becomes(caller: Caller, run_id: str, state: types_pb2.RunState.ValueType) -> None:
    """Until the run is in this state."""

    async def is_there() -> bool:
        answer = await caller.state.GetRun(state_pb2.GetRunRequest(run_id=run_id), **caller.options())
        return bool(answer.run.state == state)

    await wait_until(is_there, what=f"run {run_id} becomes {types_pb2.RunState.Name(state)}")


async def reason_of(asking: Any) -> str:
    """The reason for which a call (Any: as grpc has it) is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await asking
    reason: str = error_of(raised.value).reason
    return reason


async def test_a_pause_takes_effect_between_two_steps(ann: Caller, contract_databases: Mapping[str, Database]) -> None:
    rows = Rows(contract_databases["State"].owner_url, {})
    await ann.register(scripted_agent("steady", step("Nap.", call("diagnostics.sleep", seconds=0.7)), DONE))
    started = await ann.start("steady")
    run_id, request_id = started.run_id, new_id()
    await ann.reached(run_id, "tool_executing")
    for _ in range(2):
        await pause(ann, run_id, reason="lunch", request_id=request_id)
    await becomes(ann, run_id, PAUSED)
    events = await ann.log(run_id)
    assert names(events) == ["agent_started", "agent_thinking", "tool_executing", "tool_completed", "agent_paused"]
    paused = events[-1].agent_paused
    assert (paused.requested_by, paused.reason, paused.request_id) == (ann.user_id, "lunch", request_id)
    assert await rows.as_owner("SELECT FROM state.leases WHERE run_id = $1", run_id) == []
    assert await reason_of(pause(ann, run_id)) == "TRANSITION_ILLEGAL"
    await resume(ann, run_id)
    run = await ann.end_of(run_id)
    assert run.state == COMPLETED
    assert names(await ann.log(run_id))[5:] == ["agent_resumed", "agent_thinking", "agent_completed"]


async def test_only_the_owner_controls_what_goes_on(ann: Caller) -> None:
    run = await ann.run("echo", 1)
    await ann.register(scripted_agent("slow", step("Hm.", delay="60s", result=1)))
    started = await ann.start("slow")
    for control in (pause, resume):
        assert await reason_of(control(ann, run.run_id)) == "RUN_ENDED"
        assert await reason_of(control(ann.other_user(), started.run_id)) == "RUN_NOT_FOUND"
        assert await reason_of(control(ann, new_id())) == "RUN_NOT_FOUND"
        assert await reason_of(control(ann, "no-uuid")) == "RUN_NOT_FOUND"
    assert await reason_of(resume(ann, started.run_id)) == "TRANSITION_ILLEGAL"
    asked = ann.execution.PauseRun(pb.PauseRunRequest(run_id=started.run_id), **ann.options("viewer"))
    assert await reason_of(asked) == "ROLE_REQUIRED"
    await cancel(ann, started.run_id)
    await ann.end_of(started.run_id)


async def test_a_pause_that_is_taken_back_in_time_stops_nothing_and_is_in_the_log(ann: Caller) -> None:
    await ann.register(scripted_agent("steady", step("Nap.", call("diagnostics.sleep", seconds=1)), DONE))
    started = await ann.start("steady")
    await ann.reached(started.run_id, "tool_executing")
    await pause(ann, started.run_id)
    await resume(ann, started.run_id)
    run = await ann.end_of(started.run_id)
    assert run.state == COMPLETED
    # As what is not in the log may be told again, and taken for new.
    assert names(await ann.log(run.run_id))[3:6] == ["agent_paused", "agent_resumed", "tool_completed"]


async def test_a_paused_run_keeps_signals_until_it_is_resumed(ann: Caller) -> None:
    await ann.register(scripted_agent("waiting", step("Wait.", call("run.wait_for_signal", name="go")), DONE))
    started = await ann.start("waiting")
    run_id = started.run_id
    await becomes(ann, run_id, WAITING)
    await pause(ann, run_id)
    await becomes(ann, run_id, PAUSED)
    await ann.execution.SignalRun(pb.SignalRunRequest(run_id=run_id, name="go"), **ann.options())
    assert names(await ann.log(run_id))[-1] == "agent_paused"
    await resume(ann, run_id)
    assert (await ann.end_of(run_id)).state == COMPLETED
    assert names(await ann.log(run_id))[4:8] == ["agent_paused", "agent_resumed", "signal_received", "tool_completed"]


async def test_a_paused_run_is_cancelled(ann: Caller) -> None:
    await ann.register(scripted_agent("waiting", step("Wait.", call("run.wait_for_signal", name="go")), DONE))
    started = await ann.start("waiting")
    await becomes(ann, started.run_id, WAITING)
    await pause(ann, started.run_id)
    await becomes(ann, started.run_id, PAUSED)
    await cancel(ann, started.run_id)
    assert (await ann.end_of(started.run_id)).state == CANCELLED
    assert names(await ann.log(started.run_id))[-2:] == ["tool_completed", "agent_cancelled"]


async def test_a_run_is_paused_while_nobody_drives_it(ann: Caller, settings: ExecutionSettings) -> None:
    await ann.register(scripted_agent("steady", step("Nap.", call("diagnostics.sleep", seconds=0.5)), DONE))
    async with doomed(settings) as execution:
        run_id = await start_on(execution, ann, agent="steady")
        await ann.reached(run_id, "tool_executing")
    await pause(ann, run_id)
    await becomes(ann, run_id, PAUSED)
    assert names(await ann.log(run_id))[3] == "run_recovered"
    await resume(ann, run_id)
    run = await ann.end_of(run_id)
    assert run.state == COMPLETED
    assert names(await ann.log(run_id)).count("run_recovered") == 1


@pytest.mark.parametrize(
    ("decision", "data", "status"),
    [
        (ALLOW, {"action": "retry"}, "ok"),
        (ALLOW, {"action": "result", "result": {"made_effect": True}}, "ok"),
        (ALLOW, {"action": "fail"}, "error"),
        (DENY, None, "error"),
    ],
)
async def test_a_person_says_what_becomes_of_a_lost_unsafe_call(
    ann: Caller,
    settings: ExecutionSettings,
    tmp_path: Path,
    decision: types_pb2.ApprovalDecision.ValueType,
    data: dict[str, Any] | None,
    status: str,
) -> None:
    gate = Gate(tmp_path)
    await ann.register(scripted_agent("rocket", step("Go.", LAUNCH), DONE))
    async with doomed(settings) as execution:
        run_id = await start_on(execution, ann, agent="rocket", value=str(tmp_path))
        await gate.wait_for(1)
    await becomes(ann, run_id, WAITING)
    events = await ann.log(run_id)
    assert names(events)[3:] == ["run_recovered", "approval_requested", "agent_waiting"]
    asked = events[4].approval_requested
    assert (asked.kind, asked.call_id, orjson.loads(asked.arguments)) == (
        types_pb2.APPROVAL_KIND_UNKNOWN_OUTCOME,
        f"{run_id}.2.0",
        {"folder": str(tmp_path)},
    )
    request = pb.ResolveApprovalRequest(
        approval_id=asked.approval_id, decision=decision, data=b"" if data is None else orjson.dumps(data)
    )
    wrong = pb.ResolveApprovalRequest(approval_id=asked.approval_id, decision=ALLOW, data=b'{"action":"pray"}')
    assert await reason_of(ann.execution.ResolveApproval(wrong, **ann.options())) == "ANSWER_INVALID"
    gate.open()
    await ann.execution.ResolveApproval(request, **ann.options())
    run = await ann.end_of(run_id)
    (entry,) = orjson.loads(run.result)["calls"]
    assert (run.state, entry["status"]) == (COMPLETED, status)
    if status == "error":
        assert entry["error"]["reason"] == "WORKER_LOST"
    elif data == {"action": "retry"}:
        assert entry["result"]["call_id"] == f"{run_id}.2.0"
    else:
        assert entry["result"] == {"made_effect": True}


async def test_a_draining_executor_hands_its_runs_over_between_two_steps(
    ann: Caller, settings: ExecutionSettings
) -> None:
    nap = call("diagnostics.sleep", seconds=0.6)
    await ann.register(scripted_agent("long", step("1", nap), step("2", nap), step("3", nap), DONE))
    async with doomed(settings) as execution, asyncio.TaskGroup() as tasks:
        run_ids = [await start_on(execution, ann, agent="long") for _ in range(10)]
        for run_id in run_ids:
            await ann.reached(run_id, "tool_executing")
        tasks.create_task(execution.drain(10))
        for run_id in run_ids:
            assert (await ann.end_of(run_id)).state == COMPLETED
    for run_id in run_ids:
        events = await ann.log(run_id)
        recovered = [event.run_recovered for event in events if event.HasField("run_recovered")]
        assert [(entry.handed_back, list(entry.lost_calls)) for entry in recovered] == [(True, [])]
        assert names(events).count("tool_executing") == names(events).count("tool_completed") == 3
        assert [event.agent_thinking.step for event in events if event.HasField("agent_thinking")] == [1, 2, 3, 4]
        terminal(events)


async def test_a_run_that_was_handed_back_often_is_not_poisoned(ann: Caller, settings: ExecutionSettings) -> None:
    await ann.register(scripted_agent("thinking", step("Hm.", delay="300ms"), step("Hm.", delay="300ms"), DONE))
    run_id = ""
    for _ in range(5):
        async with doomed(settings) as execution:
            run_id = run_id or await start_on(execution, ann, agent="thinking")
            await execution.drain(10)
    assert (await ann.end_of(run_id)).state == COMPLETED


async def test_explain_says_what_a_running_run_does(ann: Caller) -> None:
    await ann.register(scripted_agent("slow", step("Nap.", call("diagnostics.sleep", seconds=60)), DONE))
    await ann.register(scripted_agent("deep", step("Hm.", delay="60s", result=1)))
    for agent, event, kind in (
        ("slow", "tool_executing", types_pb2.HOLD_KIND_TOOL),
        ("deep", "agent_started", types_pb2.HOLD_KIND_MODEL),
    ):
        started = await ann.start(agent)
        await ann.reached(started.run_id, event)
        request = pb.ExplainRunRequest(run_id=started.run_id)
        told = await ann.execution.ExplainRun(request, **ann.options("viewer"))
        assert [hold.kind for hold in told.holds] == [kind]
        assert told.executor_id
        assert told.executor_id in told.holds[0].detail
        await cancel(ann, started.run_id)
        await ann.end_of(started.run_id)
