"""Agents that call other agents, and that hand runs over, over the real services: one tree, one end, nothing twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from mainspring.v1 import events_pb2, state_pb2, types_pb2
from mainspring.v1 import execution_pb2 as pb
from mainspring_execution.config import ExecutionSettings
from mainspring_kit.identity import new_id

from test_framework.agents import Spec, call, scripted_agent, step
from test_framework.gate import Gate
from test_framework.identities import make_context
from test_framework.waiting import wait_until
from tests.contract.execution_platform import Caller, names, terminal
from tests.contract.state_calls import executing
from tests.contract.test_execution_recovery import doomed, settings, start_on

__all__ = ["settings"]

pytestmark = pytest.mark.contract

grpc_service = "Execution"
grpc_databases = ("State", "Registry")

COMPLETED, FAILED = types_pb2.RUN_STATE_COMPLETED, types_pb2.RUN_STATE_FAILED
CANCELLED, TIMED_OUT = types_pb2.RUN_STATE_CANCELLED, types_pb2.RUN_STATE_TIMED_OUT
DONE = step("Done.", result={"calls": "{{calls}}"})
HOLD = call("probe.hold", folder="{{input.value}}")
ECHO = scripted_agent("echo", step("Here.", result={"said": "{{input.value}}", "in": "{{session_id}}"}))


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


async def test_agents_call_agents_that_call_agents(ann: Caller) -> None:
    await ann.register(ECHO)
    await ann.register(boss(call("agent.echo", value="{{input.value}}"), name="chief"))
    await ann.register(boss(call("agent.chief", value="{{input.value}}")))
    run = await ann.run("boss", "deep")
    (chief,) = results(run)
    (echo,) = chief["result"]["calls"]
    assert echo["result"]["said"] == "deep"
    (middle,) = await sub_runs(ann, run.run_id)
    (leaf,) = await sub_runs(ann, middle.run_id)
    assert (leaf.depth, leaf.parent_run_id, leaf.root_run_id) == (2, middle.run_id, run.run_id)


async def test_a_tree_is_ten_deep_at_most(ann: Caller) -> None:
    await ann.register(boss(call("agent.boss")))
    run = await ann.run("boss")
    (called,), depth = results(run), 1
    while called["status"] == "ok":
        (called,), depth = called["result"]["calls"], depth + 1
    assert depth == 11
    assert called["error"]["reason"] == "DEPTH_EXCEEDED"


FAILING = scripted_agent("failing", step("Oh.", fail={"code": "INVALID_ARGUMENT", "message": "It cannot be."}))


async def test_failures_of_sub_runs_are_collected(ann: Caller) -> None:
    await ann.register(ECHO)
    await ann.register(FAILING)
    await ann.register(
        boss(call("agent.failing"), call("agent.missing"), call("agent.echo", value=1), name="boss"),
    )
    run = await ann.run("boss")
    failed, missing, echo = results(run)
    assert (failed["status"], failed["error"]["code"]) == ("error", "INVALID_ARGUMENT")
    assert failed["error"]["reason"] == "SUB_RUN_FAILED"
    assert "It cannot be." in failed["error"]["message"]
    events = await ann.log(run.run_id)
    outcome = next(event.tool_completed for event in events if event.tool_completed.tool == "agent.failing")
    (_, sub) = sorted(await sub_runs(ann, run.run_id), key=lambda found: found.agent == "failing")
    assert dict(outcome.error.metadata) == {"agent": "failing", "sub_run_id": sub.run_id, "sub_reason": "MODEL_FAILED"}
    assert (missing["status"], missing["error"]["reason"]) == ("error", "AGENT_NOT_FOUND")
    assert echo["status"] == "ok"


async def test_the_first_failure_ends_a_run_that_fails_fast(ann: Caller, tmp_path: Path) -> None:
    await ann.register(FAILING)
    await ann.register(scripted_agent("holding", step("Hold.", HOLD), DONE))
    await ann.register(
        boss(call("agent.holding", value=str(tmp_path)), call("agent.failing"), on_failure="fail_fast"),
    )
    run = await ann.run("boss")
    assert (run.state, run.error.reason) == (FAILED, "SUB_RUN_FAILED")
    assert run.error.metadata["agent"] == "failing"
    for sub in await sub_runs(ann, run.run_id):
        assert (await ann.end_of(sub.run_id)).state == (FAILED if sub.agent == "failing" else CANCELLED)


async def holding_tree(caller: Caller, folder: Path, **limits: Any) -> str:
    """A run whose sub-run's sub-run has a tool that holds on; its id."""
    await caller.register(scripted_agent("holding", step("Hold.", HOLD), DONE))
    await caller.register(boss(call("agent.holding", value="{{input.value}}"), name="chief"))
    await caller.register(boss(call("agent.chief", value="{{input.value}}"), **limits))
    started = await caller.start("boss", str(folder))
    await wait_until(lambda: list(folder.glob("*.begun")), what="the tool is under way")
    return started.run_id


async def test_a_cancel_reaches_the_tool_of_a_grandchild(ann: Caller, tmp_path: Path) -> None:
    run_id = await holding_tree(ann, tmp_path)
    await cancel(ann, run_id)
    assert (await ann.end_of(run_id)).state == CANCELLED
    await wait_until(lambda: list(tmp_path.glob("*.stopped")), what="the tool has stopped")
    (middle,) = await sub_runs(ann, run_id)
    (leaf,) = await sub_runs(ann, middle.run_id)
    for sub in (middle, leaf):
        end = terminal(await ann.log((await ann.end_of(sub.run_id)).run_id))
        assert end.reason == f"Its parent run {sub.parent_run_id} ends."
    assert end.receipt[0].acknowledged


async def test_the_deadline_of_the_root_ends_the_tree(ann: Caller, tmp_path: Path) -> None:
    run_id = await holding_tree(ann, tmp_path, limits={"timeout": "4s"})
    run = await ann.end_of(run_id)
    assert run.state == TIMED_OUT
    (middle,) = await sub_runs(ann, run_id)
    (leaf,) = await sub_runs(ann, middle.run_id)
    assert middle.deadline == leaf.deadline == run.deadline
    await wait_until(lambda: list(tmp_path.glob("*.stopped")), what="the tool has stopped")
    for sub in (middle, leaf):
        assert (await ann.end_of(sub.run_id)).state in (TIMED_OUT, CANCELLED)


async def test_a_sub_run_that_is_cancelled_by_itself_is_an_error_of_its_call(ann: Caller, tmp_path: Path) -> None:
    run_id = await holding_tree(ann, tmp_path)
    (middle,) = await sub_runs(ann, run_id)
    await cancel(ann, middle.run_id)
    (called,) = results(await ann.end_of(run_id))
    assert (called["status"], called["error"]["reason"]) == ("cancelled", "SUB_RUN_FAILED")


async def test_the_death_of_an_executor_ends_no_tree_and_doubles_nothing(
    ann: Caller, settings: ExecutionSettings, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)
    await ann.register(
        scripted_agent("gated", step("Through.", call("probe.gate", folder="{{input.value}}")), DONE),
    )
    await ann.register(boss(*[call("agent.gated", value="{{input.value}}") for _ in range(2)]))
    async with doomed(settings) as execution:
        run_id = await start_on(execution, ann, agent="boss", value=str(tmp_path))
        await gate.wait_for(2)
        await ann.reached(run_id, "agent_waiting")
    gate.open()
    run = await ann.end_of(run_id)
    assert [called["status"] for called in results(run)] == ["ok", "ok"]
    assert len(gate.effects()) == 2
    subs = await sub_runs(ann, run_id)
    assert len(subs) == 2
    for sub in subs:
        assert "run_recovered" in names(await ann.log(sub.run_id))


async def test_a_sub_run_that_was_only_meant_is_made_after_a_takeover(ann: Caller) -> None:
    await ann.register(ECHO)
    agent = await ann.register(boss(call("agent.echo", value=7)))
    user = replace(make_context(ann.tenant_id, ann.user_id), session_id="talk")
    async with executing(ann.state, ann.identities) as gone:
        create = gone.create(user, agent="boss", agent_version=agent.version)
        assert not (await gone.send_one(create)).status.code
        run_id, sub_run_id = create.run_id, new_id()
        planned = events_pb2.PlannedCall(call_id=f"{run_id}.2.0", tool="agent.echo", arguments=b'{"value":7}')
        intent = events_pb2.ToolExecuting(
            call_id=planned.call_id,
            tool=planned.tool,
            arguments=planned.arguments,
            effect=types_pb2.EFFECT_CLASS_PURE,
            sub_run_id=sub_run_id,
        )
        await gone.go_on(
            user,
            run_id,
            events_pb2.RunEvent(agent_thinking=events_pb2.AgentThinking(step=1, planned_calls=[planned])),
            events_pb2.RunEvent(tool_executing=intent),
            after=1,
        )
    (called,) = results(await ann.end_of(run_id))
    assert called["result"]["said"] == 7
    assert [sub.run_id for sub in await sub_runs(ann, run_id)] == [sub_run_id]


HELP = scripted_agent(
    "help",
    step("Let me see.", call("diagnostics.echo", value="seen"), call("handoff.expert", reason="It is hard.")),
    handoffs=["expert"],
)
EXPERT = scripted_agent(
    "expert",
    step("I take it.", call("probe.gate", folder="{{input.value}}")),
    step("Done.", result={"first": "{{calls[0].result.value}}", "calls": "{{calls}}", "step": "{{step}}"}),
)


def hands_over(spec: Spec) -> Spec:
    """The agent without the names of handoffs among its tools."""
    return {**spec, "tools": [tool for tool in spec["tools"] if not tool.startswith("handoff.")]}


async def test_a_run_goes_on_as_another_agent(ann: Caller, tmp_path: Path) -> None:
    Gate(tmp_path).open()
    expert = await ann.register(EXPERT)
    await ann.register(hands_over(HELP))
    run = await ann.run("help", str(tmp_path))
    assert run.state == COMPLETED, run.error
    result = orjson.loads(run.result)
    assert (result["first"], result["step"]) == ("seen", 3)
    assert result["calls"][1]["result"] == {"agent": "expert", "version": expert.version}
    events = await ann.log(run.run_id)
    place = names(events).index("agent_handed_off")
    handed = events[place].agent_handed_off
    assert (handed.from_agent, handed.to_agent, handed.to_version) == ("help", "expert", expert.version)
    assert handed.reason == "It is hard."
    assert {event.agent for event in events[: place + 1]} == {"help"}
    assert {event.agent for event in events[place + 1 :]} == {"expert"}
    assert run.agent == "help"


async def test_a_takeover_after_a_handoff_goes_on_as_the_other_agent(
    ann: Caller, settings: ExecutionSettings, tmp_path: Path
) -> None:
    gate = Gate(tmp_path)
    await ann.register(EXPERT)
    await ann.register(hands_over(HELP))
    async with doomed(settings) as execution:
        run_id = await start_on(execution, ann, agent="help", value=str(tmp_path))
        await gate.wait_for(1)
    gate.open()
    run = await ann.end_of(run_id)
    assert run.state == COMPLETED, run.error
    assert len(gate.effects()) == 1
    events = await ann.log(run_id)
    assert names(events).count("agent_handed_off") == 1
    assert {event.agent for event in events[names(events).index("run_recovered") :]} == {"expert"}


async def test_one_handoff_of_a_step_counts_and_one_that_cannot_be_is_told_the_model(ann: Caller) -> None:
    await ann.register(scripted_agent("expert", step("Done.", result={"calls": "{{calls}}"})))
    calls = [call(f"handoff.{name}") for name in ("missing", "expert", "expert")]
    await ann.register(hands_over(scripted_agent("help", step("Over.", *calls), handoffs=["missing", "expert"])))
    run = await ann.run("help")
    told = [(entry["status"], (entry["error"] or {}).get("reason")) for entry in results(run)]
    assert told == [("error", "AGENT_NOT_FOUND"), ("ok", None), ("error", "HANDED_OFF")]


async def test_a_cancel_ends_the_run_that_was_handed_over(ann: Caller, tmp_path: Path) -> None:
    await ann.register(scripted_agent("expert", step("Hold.", HOLD), DONE))
    await ann.register(hands_over(HELP))
    started = await ann.start("help", str(tmp_path))
    await wait_until(lambda: list(tmp_path.glob("*.begun")), what="the tool is under way")
    await cancel(ann, started.run_id)
    assert (await ann.end_of(started.run_id)).state == CANCELLED
    await wait_until(lambda: list(tmp_path.glob("*.stopped")), what="the tool has stopped")
