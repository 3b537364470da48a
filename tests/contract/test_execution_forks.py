"""Runs that are started again, and runs that begin with another one's steps: nothing finished is done or paid twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from mainspring.v1 import events_pb2, types_pb2
from mainspring.v1 import execution_pb2 as pb
from mainspring_execution.core.forks import planned_ids, repeat
from mainspring_kit.identity import new_id

from test_framework.agents import Spec, call, scripted_agent, step
from test_framework.gate import Gate
from test_framework.identities import make_context
from tests.contract.execution_platform import Caller, names
from tests.contract.state_calls import executing
from tests.contract.test_execution_control import cancel, reason_of

pytestmark = pytest.mark.contract

grpc_service = "Execution"
grpc_databases = ("State", "Registry")

COMPLETED, FAILED = types_pb2.RUN_STATE_COMPLETED, types_pb2.RUN_STATE_FAILED
DONE = step("Done.", result={"calls": "{{calls}}"})


def count(name: str) -> Spec:
    """A call that leaves a line."""
    return call("diagnostics.count", file="{{input.value}}", name=name)


def lines(file: Path) -> list[str]:
    """The names of the effects there were."""
    return [line.split()[0] for line in file.read_text().splitlines()]


async def fork(caller: Caller, run_id: str, seq: int, **fields: Any) -> pb.ForkRunResponse:
    """Forks a run (Any: fields of the request)."""
    request = pb.ForkRunRequest(run_id=run_id, seq=seq, **fields)
    response: pb.ForkRunResponse = await caller.execution.ForkRun(request, **caller.options())
    return response


async def retry(caller: Caller, run_id: str, request_id: str = "") -> pb.RetryRunResponse:
    request = pb.RetryRunRequest(run_id=run_id, request_id=request_id)
    response: pb.RetryRunResponse = await caller.execution.RetryRun(request, **caller.options())
    return response


async def test_a_failed_run_is_tried_again_as_it_was(ann: Caller, tmp_path: Path) -> None:
    file = tmp_path / "lines"
    agent = await ann.register(
        scripted_agent("frail", step("Count.", count("once")), step("Oh.", fail={"code": "INVALID_ARGUMENT"}))
    )
    failed = await ann.run("frail", str(file), session_id="talk", priority=7)
    assert failed.state == FAILED
    await ann.register(scripted_agent("frail", step("Better.", result=1)))
    request_id = new_id()
    first, again = [await retry(ann, failed.run_id, request_id) for _ in range(2)]
    assert first.run_id == again.run_id != failed.run_id
    run = await ann.end_of(first.run_id)
    assert (run.agent_version, run.session_id, run.input, run.priority) == (
        agent.version,
        "talk",
        failed.input,
        7,
    )
    assert (run.attempt, run.source_run_id, run.ordinal) == (2, failed.run_id, 2)
    started = (await ann.log(run.run_id))[0].agent_started
    assert (started.attempt, started.source_run_id, started.source_seq) == (2, failed.run_id, 0)
    assert lines(file) == ["once", "once"]
    third = await ann.end_of((await retry(ann, run.run_id)).run_id)
    assert (third.attempt, third.source_run_id) == (3, run.run_id)


async def test_only_what_ended_badly_is_tried_again(ann: Caller) -> None:
    done = await ann.run("echo", 1)
    assert await reason_of(retry(ann, done.run_id)) == "TRANSITION_ILLEGAL"
    await ann.register(scripted_agent("napping", step("Nap.", call("run.sleep", seconds=60)), DONE))
    started = await ann.start("napping")
    assert await reason_of(retry(ann, started.run_id)) == "TRANSITION_ILLEGAL"
    await cancel(ann, started.run_id)
    await ann.end_of(started.run_id)
    second = await retry(ann, started.run_id)
    await cancel(ann, second.run_id)
    for run_id in (new_id(), "none"):
        assert await reason_of(retry(ann, run_id)) == await reason_of(fork(ann, run_id, 1)) == "RUN_NOT_FOUND"
    stranger = ann.other_user()
    assert await reason_of(retry(stranger, started.run_id)) == "RUN_NOT_FOUND"
    assert await reason_of(fork(stranger, done.run_id, 1)) == "RUN_NOT_FOUND"


async def test_a_fork_goes_on_from_an_event_and_does_nothing_again(ann: Caller, tmp_path: Path) -> None:
    file = tmp_path / "lines"
    await ann.register(
        scripted_agent("counting", step("One.", count("one")), step("Two.", count("two"), count("two")), DONE)
    )
    source = await ann.run("counting", str(file), session_id="talk")
    log = await ann.log(source.run_id)
    assert lines(file) == ["one", "two", "two"]
    # The second step had not ended by then.
    seq = next(event.seq for event in log if event.agent_thinking.step == 2) + 1
    forked = await ann.end_of((await fork(ann, source.run_id, seq)).run_id)
    assert forked.state == COMPLETED, forked.error
    assert lines(file) == ["one", "two", "two", "two", "two"]
    assert (forked.source_run_id, forked.source_seq, forked.attempt, forked.session_id) == (
        source.run_id,
        seq,
        1,
        "talk",
    )
    events = await ann.log(forked.run_id)
    assert names(events) == names(log)
    started = events[0].agent_started
    assert (started.source_run_id, started.source_seq) == (source.run_id, seq)
    assert [event.source_seq for event in events] == [0, 2, 3, 4, *[0] * (len(events) - 4)]
    assert events[1].agent_thinking.usage == log[1].agent_thinking.usage
    call_ids = [call.call_id for event in events for call in event.agent_thinking.planned_calls]
    assert all(call_id.startswith(forked.run_id) for call_id in call_ids)
    assert events[3].tool_completed.call_id == call_ids[0] == f"{forked.run_id}.2.0"
    # What the source has paid for is not paid again.
    assert 0 < forked.usage.output_tokens < source.usage.output_tokens


async def test_a_fork_from_the_end_asks_only_for_the_last_step_again(ann: Caller, tmp_path: Path) -> None:
    file = tmp_path / "lines"
    await ann.register(scripted_agent("counting", step("One.", count("one")), DONE))
    source = await ann.run("counting", str(file))
    assert await reason_of(fork(ann, source.run_id, source.last_seq + 1)) == "REQUEST_INVALID"
    assert await reason_of(fork(ann, source.run_id, 0)) == "REQUEST_INVALID"
    request_id = new_id()
    asked = [await fork(ann, source.run_id, source.last_seq, request_id=request_id) for _ in range(2)]
    assert asked[0].run_id == asked[1].run_id
    assert await reason_of(fork(ann, source.run_id, 1, request_id=request_id)) == "IDEMPOTENCY_KEY_REUSED"
    forked = await ann.end_of(asked[0].run_id)
    assert lines(file) == ["one"]
    assert orjson.loads(forked.result)["calls"][0]["call_id"] == f"{forked.run_id}.2.0"
    # A fork of a fork, with another version, in a session of its own.
    better = await ann.register(scripted_agent("counting", step("Never."), step("New.", result="{{calls[0].result}}")))
    asked_again = await fork(ann, forked.run_id, forked.last_seq, version=better.version, session_id="aside")
    last = await ann.end_of(asked_again.run_id)
    assert (last.agent_version, last.session_id) == (better.version, "aside")
    assert orjson.loads(last.result)["name"] == "one"
    assert lines(file) == ["one"]


async def test_a_fork_that_stood_in_line_takes_the_steps_over_when_its_turn_comes(ann: Caller, tmp_path: Path) -> None:
    file, gate = tmp_path / "lines", Gate(tmp_path)
    await ann.register(scripted_agent("counting", step("One.", count("one")), DONE))
    await ann.register(scripted_agent("gated", step("Wait.", call("probe.gate", folder="{{input.value}}")), DONE))
    source = await ann.run("counting", str(file), session_id="talk")
    before = await ann.start("gated", str(tmp_path), session_id="talk")
    asked = await fork(ann, source.run_id, source.last_seq)
    assert asked.state == types_pb2.RUN_STATE_QUEUED
    gate.open()
    await ann.end_of(before.run_id)
    forked = await ann.end_of(asked.run_id)
    assert forked.state == COMPLETED
    assert [event.source_seq for event in await ann.log(forked.run_id)] == [0, 2, 3, 4, 0, 0]
    assert lines(file) == ["one"]


async def test_a_fork_takes_a_handoff_and_waits_over(ann: Caller) -> None:
    expert = scripted_agent("expert", step("Ask.", call("agent.echo", value=3)), DONE)
    await ann.register({**expert, "tools": [{"agent": "echo"}]})
    helping = scripted_agent(
        "help",
        step("Wait.", call("run.sleep", seconds=0.1)),
        step("Over.", call("handoff.expert")),
        handoffs=["expert"],
    )
    await ann.register({**helping, "tools": ["run.sleep"]})
    source = await ann.run("help")
    assert source.state == COMPLETED, source.error
    forked = await ann.end_of((await fork(ann, source.run_id, source.last_seq)).run_id)
    assert forked.state == COMPLETED, forked.error
    events = await ann.log(forked.run_id)
    assert "agent_waiting" not in names(events)
    assert [event.tool_executing.sub_run_id for event in events if event.HasField("tool_executing")] == ["", "", ""]
    assert events[-1].agent == "expert"

    def told(run: types_pb2.Run) -> list[Any]:
        return [entry["result"] for entry in orjson.loads(run.result)["calls"]]

    assert told(forked) == told(source)


async def test_a_fork_is_taken_up_where_its_executor_died(ann: Caller, tmp_path: Path) -> None:
    file = tmp_path / "lines"
    steps = [step(f"{number}.", *[count(f"n{number}-{index}") for index in range(10)]) for number in range(8)]
    agent = await ann.register(scripted_agent("long", *steps, DONE))
    source = await ann.run("long", str(file))
    assert source.state == COMPLETED, source.error
    log = await ann.log(source.run_id)
    user = replace(make_context(ann.tenant_id, ann.user_id), session_id="talk")
    async with executing(ann.state, ann.identities) as gone:
        create = gone.create(user, agent="long", agent_version=agent.version, input=source.input)
        started = create.events[0].agent_started
        started.source_run_id, started.source_seq, started.input = source.run_id, source.last_seq, source.input
        assert not (await gone.send_one(create)).status.code
        # Thirty events are in the middle of the second step.
        call_ids: dict[str, str] = {}
        copied = []
        for seq, event in enumerate(log[1:31], start=2):
            copy = repeat(event, run_id=create.run_id, seq=seq, call_ids=call_ids)
            copied.append(events_pb2.RunEvent(**copy))
            call_ids |= zip(planned_ids([event]), planned_ids(copied[-1:]), strict=True)
        await gone.go_on(user, create.run_id, *copied, after=1)
    forked = await ann.end_of(create.run_id)
    assert forked.state == COMPLETED, forked.error
    assert len(lines(file)) == 80
    events = await ann.log(forked.run_id)
    assert [event.source_seq for event in events if event.source_seq] == list(range(2, 2 + 8 * 21))
    assert names(events).count("run_recovered") == 1
    assert len({outcome.call_id for event in events if (outcome := event.tool_completed).call_id}) == 80
