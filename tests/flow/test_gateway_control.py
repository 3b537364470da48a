"""What people ask of runs under way, by socket and by HTTP: each wish is durable when answered, and done once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from test_framework.agents import Spec, call, scripted_agent, step
from test_framework.gate import Gate, gated_agent
from test_framework.identities import make_context, unique
from test_framework.stack import Stack
from test_framework.user import User
from test_framework.waiting import wait_until
from test_framework.websocket_client import StreamClient, check_log, types

pytestmark = [pytest.mark.flow, pytest.mark.websocket, pytest.mark.real_services]

ANSWER_SCHEMA = {"type": "object", "properties": {"limit": {"type": "integer"}}, "required": ["limit"]}


def expecting_agent() -> Spec:
    """It waits for a signal and ends with what that brought."""
    waits = step("I wait.", call("run.wait_for_signal", name="go"))
    return scripted_agent("expecting", waits, step("It came.", result="{{calls[0].result.data}}"))


def asking_agent() -> Spec:
    """It asks for leave and ends with what was answered."""
    asks = step("May I?", call("human.approve", title="Spend it?", arguments={"sum": 7}, answer_schema=ANSWER_SCHEMA))
    return scripted_agent("asking", asks, step("Good.", result="{{calls[0].result.data.limit}}"))


def failing_agent() -> Spec:
    """It fails for good."""
    fails = step("I try.", fail={"code": "INVALID_ARGUMENT", "message": "It can't be done.", "times": 9})
    return scripted_agent("failing", fails)


def calling_agent() -> Spec:
    """It calls another agent, which calls a third."""
    return scripted_agent("calling", step("Help!", call("agent.middle")), step("Done.", result="{{calls[0].result}}"))


def middle_agent() -> Spec:
    """It calls a third agent."""
    return scripted_agent("middle", step("Help!", call("agent.lowest")), step("Done.", result="{{calls[0].result}}"))


@pytest.fixture(scope="module")
def flow_stack(real_services_fixture: Stack) -> Stack:
    """The session's: nothing is killed here."""
    return real_services_fixture


@pytest.fixture
async def ready_user(user: User) -> User:
    """A user whose tenant has the agents."""
    await user.register(expecting_agent(), asking_agent(), failing_agent(), gated_agent())
    return user


@pytest.fixture
async def socket(ready_user: User) -> AsyncIterator[StreamClient]:
    async with ready_user.stream() as client:
        yield client


async def holds(user: User, run_id: str) -> dict[str, Any]:  # Any: JSON
    """The first reason why a run does not go on."""
    answer = await user.http("GET", f"/v1/runs/{run_id}:explain", role="viewer")
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json
    return found["holds"][0] | {"state": found["run"]["state"]} if found["holds"] else {"state": found["run"]["state"]}


async def test_a_run_waits_for_its_signal_and_says_so(ready_user: User, socket: StreamClient) -> None:
    run_id = await socket.start("expecting", {})
    waiting = await socket.until(run_id, "agent_waiting")
    assert (waiting["data"]["for"], len(waiting["data"]["call_ids"])) == ("signal", 1)
    assert "go" in waiting["data"]["detail"]
    hold = await holds(ready_user, run_id)
    assert (hold["kind"], hold["state"]) == ("signal", "WAITING")
    assert (await socket.ask("signal", run_id=run_id, name="other", data=1))["op"] == "ok"
    assert (await socket.ask("signal", run_id=run_id, name="go", data={"parcel": [7, None]}))["op"] == "ok"
    events = await socket.ended(run_id)
    check_log(events)
    signals = [event["data"] for event in events if event["type"] == "signal_received"]
    by = ready_user.context.user_id
    assert signals == [
        {"name": "other", "data": 1, "by": by},
        {"name": "go", "data": {"parcel": [7, None]}, "by": by},
    ]
    assert events[-1]["data"]["result"] == {"parcel": [7, None]}
    assert (await socket.ask("signal", run_id=run_id, name="go"))["reason"] == "RUN_ENDED"
    assert await holds(ready_user, run_id) == {"state": "COMPLETED"}


async def test_a_signal_under_a_key_comes_once(ready_user: User, socket: StreamClient, gate: Gate) -> None:
    run_id = await socket.start("gated", {"gate": gate.path, "value": 1})
    await gate.wait_for(1)
    for key in ("k", "k", "other"):
        path, headers = f"/v1/runs/{run_id}:signal", {"Idempotency-Key": key}
        answer = await ready_user.http("POST", path, {"name": "n", "data": key}, headers=headers)
        assert answer.status == 202, answer.body
    gate.open()
    events = await socket.ended(run_id)
    signals = [event["data"]["data"] for event in events if event["type"] == "signal_received"]
    assert signals == ["k", "other"]


async def test_a_paused_run_stands_still_until_it_is_resumed(
    ready_user: User, socket: StreamClient, gate: Gate
) -> None:
    run_id = await socket.start("gated", {"gate": gate.path, "value": 1})
    await gate.wait_for(1)
    assert (await socket.ask("resume", run_id=run_id))["reason"] == "TRANSITION_ILLEGAL"
    assert (await socket.ask("pause", run_id=run_id, reason="a look first"))["op"] == "ok"
    gate.open()
    paused = await socket.until(run_id, "agent_paused")
    assert paused["data"] == {"requested_by": ready_user.context.user_id, "reason": "a look first"}
    hold = await holds(ready_user, run_id)
    assert (hold["kind"], hold["state"]) == ("paused", "PAUSED")
    again = await ready_user.http("POST", f"/v1/runs/{run_id}:pause")
    assert (again.status, again.json["reason"]) == (409, "TRANSITION_ILLEGAL")
    resumed = await ready_user.http("POST", f"/v1/runs/{run_id}:resume")
    assert (resumed.status, resumed.json) == (202, {"run_id": run_id})
    events = await socket.ended(run_id)
    check_log(events)
    assert types(events)[-1] == "agent_completed"
    assert types(events).index("agent_paused") < types(events).index("agent_resumed")


async def test_an_approval_is_listed_answered_once_and_shown(ready_user: User, socket: StreamClient) -> None:
    run_id = await socket.start("asking", {})
    asked = (await socket.until(run_id, "approval_requested"))["data"]
    await socket.until(run_id, "agent_waiting")
    assert (asked["title"], asked["arguments"], asked["answer_schema"]) == ("Spend it?", {"sum": 7}, ANSWER_SCHEMA)
    approval_id = asked["approval_id"]
    listed = (await ready_user.http("GET", "/v1/approvals")).json["approvals"]
    assert [(row["approval_id"], row["run_id"], row["decision"]) for row in listed] == [(approval_id, run_id, "open")]
    hold = await holds(ready_user, run_id)
    assert (hold["kind"], hold["approval_id"]) == ("approval", approval_id)
    path = f"/v1/approvals/{approval_id}"
    assert (await ready_user.http("POST", f"{path}:resolve", {"decision": "allow"}, role="viewer")).status == 403
    wrong = await socket.ask("approve", approval_id=approval_id, decision="allow", data={"limit": "much"})
    assert wrong["reason"] == "ANSWER_INVALID"
    answer = await socket.ask("approve", approval_id=approval_id, decision="allow", data={"limit": 9})
    assert answer["op"] == "ok"
    late = await ready_user.http("POST", f"{path}:resolve", {"decision": "deny"})
    # The run may be over by then.
    assert (late.status, late.json["reason"]) in ((409, "APPROVAL_RESOLVED"), (409, "RUN_ENDED"))
    events = await socket.ended(run_id)
    check_log(events)
    resolved = next(event["data"] for event in events if event["type"] == "approval_resolved")
    by = ready_user.context.user_id
    assert resolved == {"approval_id": approval_id, "decision": "allow", "data": {"limit": 9}, "by": by}
    assert events[-1]["data"]["result"] == 9
    assert (await ready_user.http("GET", "/v1/approvals")).json["approvals"] == []
    read = (await ready_user.http("GET", path)).json
    assert (read["decision"], read["data"], read["answered_by"]) == ("allow", {"limit": 9}, by)


async def test_a_refused_question_is_told_to_the_model(ready_user: User, socket: StreamClient) -> None:
    run_id = await socket.start("asking", {})
    approval_id = (await socket.until(run_id, "approval_requested"))["data"]["approval_id"]
    denied = await ready_user.http("POST", f"/v1/approvals/{approval_id}:resolve", {"decision": "deny"})
    assert (denied.status, denied.json) == (202, {"approval_id": approval_id, "run_id": run_id})
    outcome = (await socket.until(run_id, "tool_completed"))["data"]
    assert (outcome["status"], outcome["error"]["reason"]) == ("denied", "APPROVAL_DENIED")


@pytest.mark.parametrize("is_colleague", [True, False], ids=["a colleague", "a stranger"])
async def test_what_is_a_users_own_is_out_of_reach_of_others(
    ready_user: User, socket: StreamClient, is_colleague: bool
) -> None:
    run_id = await socket.start("asking", {})
    approval_id = (await socket.until(run_id, "approval_requested"))["data"]["approval_id"]
    tenant_id = ready_user.context.tenant_id if is_colleague else unique("tenant")
    async with User(ready_user.stack, make_context(tenant_id)) as other, other.stream() as foreign:
        for op, fields, reason in (
            ("pause", {"run_id": run_id}, "RUN_NOT_FOUND"),
            ("resume", {"run_id": run_id}, "RUN_NOT_FOUND"),
            ("retry", {"run_id": run_id}, "RUN_NOT_FOUND"),
            ("signal", {"run_id": run_id, "name": "go"}, "RUN_NOT_FOUND"),
            ("approve", {"approval_id": approval_id, "decision": "allow"}, "APPROVAL_NOT_FOUND"),
        ):
            assert (await foreign.ask(op, **fields))["reason"] == reason, op
        for method, path, body in (
            ("GET", f"/v1/runs/{run_id}:explain", None),
            ("POST", f"/v1/runs/{run_id}:fork", {"seq": 1}),
            ("GET", f"/v1/approvals/{approval_id}", None),
        ):
            assert (await other.http(method, path, body)).status == 404, path
        assert (await other.http("GET", "/v1/approvals")).json["approvals"] == []
    assert (await ready_user.http("POST", f"/v1/runs/{run_id}:cancel")).status == 202
    await socket.ended(run_id)


async def test_a_failed_run_is_started_again_and_followed(ready_user: User, socket: StreamClient) -> None:
    run_id = await socket.start("failing", {"value": 3})
    check_log(await socket.ended(run_id))
    answer = await socket.ask("retry", run_id=run_id)
    assert answer["op"] == "started", answer
    assert answer["run_id"] != run_id
    events = await socket.ended(answer["run_id"])
    check_log(events)
    started = events[0]["data"]
    assert (started["attempt"], started["source_run_id"], started["input"]) == (2, run_id, {"value": 3})
    run = await ready_user.get_run(answer["run_id"])
    assert (run["attempt"], run["source_run_id"]) == (2, run_id)
    third = await ready_user.http("POST", f"/v1/runs/{answer['run_id']}:retry")
    assert third.status == 201, third.body
    assert (await ready_user.get_run(third.json["run_id"]))["attempt"] == 3


async def test_a_fork_takes_over_what_was_done(ready_user: User, socket: StreamClient, gate: Gate) -> None:
    gate.open()
    run_id = await socket.start("gated", {"gate": gate.path, "value": 1})
    events = await socket.ended(run_id)
    seq = next(event["seq"] for event in events if event["type"] == "tool_completed")
    forked = await ready_user.http("POST", f"/v1/runs/{run_id}:fork", {"seq": seq, "session_id": unique("session")})
    assert forked.status == 201, forked.body
    await socket.follow(forked.json["run_id"])
    copy = await socket.ended(forked.json["run_id"])
    check_log(copy)
    assert copy[-1]["data"]["result"] == events[-1]["data"]["result"]
    assert len(gate.effects()) == 1
    assert [event["source_seq"] for event in copy if "source_seq" in event]
    beyond = await ready_user.http("POST", f"/v1/runs/{run_id}:fork", {"seq": 99})
    assert (beyond.status, beyond.json["reason"]) == (400, "REQUEST_INVALID")


async def test_who_follows_a_run_is_shown_all_below_it(ready_user: User, socket: StreamClient) -> None:
    lowest = scripted_agent("lowest", step("So deep.", result={"depth": 2}))
    await ready_user.register(lowest, middle_agent(), calling_agent())
    run_id = await socket.start("calling", {})
    check_log(await socket.ended(run_id))
    logs: dict[str, list[Any]] = {}

    def is_whole() -> bool:
        logs.clear()
        for event in socket.events():
            logs.setdefault(event["agent"], []).append(event)
        return {"calling", "middle", "lowest"} <= {
            name for name, log in logs.items() if log[-1]["type"] == "agent_completed"
        }

    await socket.wait_for(lambda _: is_whole(), "the logs of all three")
    for log in logs.values():
        check_log(log)
    middle = logs["middle"][0]
    assert (middle["data"]["parent_run_id"], middle["data"]["root_run_id"]) == (run_id, run_id)
    lowest_started = logs["lowest"][0]["data"]
    assert (lowest_started["parent_run_id"], lowest_started["root_run_id"]) == (middle["run_id"], run_id)
    below = (await ready_user.http("GET", f"/v1/runs?parent_run_id={run_id}")).json["runs"]
    assert [run["run_id"] for run in below] == [middle["run_id"]]


async def test_whoever_unfollows_the_top_is_shown_nothing_below(
    ready_user: User, socket: StreamClient, gate: Gate
) -> None:
    await ready_user.register(
        scripted_agent("above", step("Go.", call("agent.gated", gate=gate.path, value=1)), step("Done.", result=1))
    )
    run_id = await socket.start("above", {})
    announced = await socket.until(run_id, "tool_executing")
    below = announced["data"]["sub_run_id"]
    await socket.until(below, "tool_executing")
    assert (await socket.ask("unfollow", run_id=run_id))["op"] == "ok"
    async with ready_user.stream() as other:
        await other.follow(run_id)
        gate.open()
        check_log(await other.ended(run_id))
        await other.ended(below)
    assert (await socket.ask("ping"))["op"] == "pong"
    assert "tool_completed" not in types(socket.events(below)) + types(socket.events(run_id))


async def test_a_start_may_be_put_off(ready_user: User, socket: StreamClient, gate: Gate) -> None:
    gate.open()
    start_time = datetime.now(UTC) + timedelta(seconds=1.5)
    answer = await socket.ask(
        "start", agent="gated", input={"gate": gate.path, "value": 2}, start_time=start_time.isoformat(), priority=5
    )
    assert (answer["op"], answer["state"]) == ("started", "QUEUED")
    assert (await ready_user.get_run(answer["run_id"]))["priority"] == 5
    hold = await holds(ready_user, answer["run_id"])
    assert (hold["kind"], hold["state"]) == ("timer", "QUEUED")
    events = await socket.ended(answer["run_id"])
    check_log(events)
    assert datetime.fromisoformat(events[0]["event_time"]) >= start_time - timedelta(milliseconds=50)


async def test_what_runs_cost_is_told_to_operators(ready_user: User, socket: StreamClient, gate: Gate) -> None:
    gate.open()
    run_id = await socket.start("gated", {"gate": gate.path, "value": 1})
    events = await socket.ended(run_id)

    async def rows() -> list[dict[str, Any]]:
        answer = await ready_user.http("GET", f"/v1/metrics/runs?run_id={run_id}", role="operator")
        assert answer.status == 200, answer.body
        found: list[dict[str, Any]] = answer.json["metrics"]
        return found

    (row,) = await wait_until(rows, what="the row")
    assert (row["agent"], row["state"], row["model_calls"], row["tool_calls"]) == ("gated", "COMPLETED", 2, 1)
    assert row["user_id"] == ready_user.context.user_id
    assert row["usage"] == events[-1]["data"]["usage"]
