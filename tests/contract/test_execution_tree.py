"""Agents that call other agents, and that hand runs over, over the real services: one tree, one end, nothing twice."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from mainspring.v1 import execution_pb2 as pb
from mainspring.v1 import state_pb2, types_pb2

from test_framework.agents import Spec, call, scripted_agent, step
from tests.contract.execution_platform import Caller, names
from tests.contract.test_execution_recovery import settings

__all__ = ["settings"]

pytestmark = pytest.mark.contract

grpc_service = "Execution"
grpc_databases = ("State", "Registry")

COMPLETED, FAILED = types_pb2.RUN_STATE_COMPLETED, types_pb2.RUN_STATE_FAILED
CANCELLED, TIMED_OUT = types_pb2.RUN_STATE_CANCELLED, types_pb2.RUN_STATE_TIMED_OUT
DONE = step("Done.", result={"calls": "{{calls}}"})
ECHO = scripted_agent("echo", step("Here.", result={"said": "{{input.value}}", "in": "{{session_id}}"}))
COUNT = call("diagnostics.count", file="{{input.value}}", name="{{run_id}}")


def boss(*calls: Spec, name: str = "boss", on_failure: str = "collect", **more: Any) -> Spec:
    """An agent that makes these calls, also of agents, then tells how they ended."""
    spec = scripted_agent(name, step("Do it.", *calls), DONE, **more)
    spec["tools"] = [
        {"agent": tool.removeprefix("agent."), "on_failure": on_failure} if tool.startswith("agent.") else tool
        for tool in spec["tools"]
        if not tool.startswith("handoff.")
    ]
    return spec


async def sub_runs(caller: Caller, run_id: str) -> list[types_pb2.Run]:
    """The sub-runs of a run, oldest first."""
    answer = await caller.state.ListRuns(state_pb2.ListRunsRequest(parent_run_id=run_id), **caller.options())
    return list(answer.runs)[::-1]


async def cancel(caller: Caller, run_id: str) -> None:
    await caller.execution.CancelRun(pb.CancelRunRequest(run_id=run_id), **caller.options())


def results(run: types_pb2.Run) -> list[Any]:
    """How the calls of a boss ended: JSON values."""
    assert run.state == COMPLETED, run.error
    calls: list[Any] = orjson.loads(run.result)["calls"]
    return calls


async def test_parallel_sub_runs_join(ann: Caller) -> None:
    await ann.register(ECHO)
    await ann.register(
        boss(
            *(call("agent.echo", value=number) for number in range(5)),
            call("diagnostics.echo", value="beside"),
        )
    )
    run = await ann.run("boss", session_id="talk")
    called = results(run)
    assert [entry["result"] for entry in called[:5]] == [{"said": number, "in": "talk"} for number in range(5)]
    assert called[5]["result"] == {"value": "beside"}
    subs = await sub_runs(ann, run.run_id)
    assert len(subs) == 5
    for sub in subs:
        assert (sub.parent_run_id, sub.root_run_id, sub.depth, sub.ordinal) == (run.run_id, run.run_id, 1, 0)
        assert sub.session_id == "talk"
        assert sub.deadline.ToNanoseconds() <= run.deadline.ToNanoseconds()
        started = (await ann.log(sub.run_id))[0]
        assert (started.parent_run_id, started.root_run_id, started.agent) == (run.run_id, run.run_id, "echo")
    events = await ann.log(run.run_id)
    named = [event.tool_executing.sub_run_id for event in events if event.tool_executing.sub_run_id]
    assert sorted(named) == [sub.run_id for sub in subs]
    assert names(events).count("tool_completed") == 6
