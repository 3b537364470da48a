"""Runs that wait hold nothing: sleeps, signals and questions over the real services, and how each of them ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
import orjson
import pytest
from mainspring.v1 import execution_pb2 as pb
from mainspring.v1 import state_pb2, types_pb2
from mainspring_kit.identity import new_id

from test_framework.agents import Spec, call, scripted_agent, step
from test_framework.grpc_testing import error_of
from test_framework.rows import Rows
from test_framework.servers import Database
from test_framework.waiting import wait_until
from tests.contract.execution_platform import Caller, names, terminal

pytestmark = pytest.mark.contract

grpc_service = "Execution"
grpc_databases = ("State", "Registry")

COMPLETED, CANCELLED = types_pb2.RUN_STATE_COMPLETED, types_pb2.RUN_STATE_CANCELLED
WAITING, TIMED_OUT = types_pb2.RUN_STATE_WAITING, types_pb2.RUN_STATE_TIMED_OUT
ALLOW, DENY = types_pb2.APPROVAL_DECISION_ALLOW, types_pb2.APPROVAL_DECISION_DENY
DONE = step("Done.", result={"calls": "{{calls}}"})


@pytest.fixture
def rows(contract_databases: Mapping[str, Database]) -> Rows:
    """What the tables hold."""
    return Rows(contract_databases["State"].owner_url, {})


def waiting_agent(*calls: Spec, **more: Any) -> Spec:
    """An agent that makes these calls, then tells how they ended."""
    return scripted_agent("waiting", step("Wait.", *calls), DONE, **more)


async def waits(caller: Caller, run_id: str) -> types_pb2.Run:
    """The run, once it is WAITING."""

    async def found() -> list[types_pb2.Run]:
        answer = await caller.state.GetRun(state_pb2.GetRunRequest(run_id=run_id), **caller.options())
        return [answer.run] if answer.run.state == WAITING else []

    (run,) = await wait_until(found, what=f"run {run_id} waits")
    return run


async def signal(caller: Caller, run_id: str, name: str, data: Any = None, *, request_id: str = "") -> None:
    """Sends a signal; Any: a JSON value."""
    request = pb.SignalRunRequest(run_id=run_id, name=name, data=orjson.dumps(data), request_id=request_id)
    await caller.execution.SignalRun(request, **caller.options())


async def resolve(
    caller: Caller,
    approval_id: str,
    decision: types_pb2.ApprovalDecision.ValueType,
    *,
    role: str = "runner",
    **more: Any,
) -> None:
    """Answers an approval (Any: fields of the request)."""
    request = pb.ResolveApprovalRequest(approval_id=approval_id, decision=decision, **more)
    await caller.execution.ResolveApproval(request, **caller.options(role))


async def asked(caller: Caller, run_id: str) -> str:
    """The id of the approval that the run waits for, once it is asked."""
    events = await caller.reached(run_id, "approval_requested")
    await waits(caller, run_id)
    return next(event.approval_requested.approval_id for event in events if event.HasField("approval_requested"))


async def reason_of(asking: Any) -> str:
    """The reason for which a call (Any: as grpc has it) is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await asking
    reason: str = error_of(raised.value).reason
    return reason


def results(run: types_pb2.Run) -> list[Any]:
    """How the calls of the waiting agent ended: JSON values."""
    assert run.state == COMPLETED, run.error
    calls: list[Any] = orjson.loads(run.result)["calls"]
    return calls


async def test_a_short_sleep_stays_with_its_executor(ann: Caller) -> None:
    await ann.register(waiting_agent(call("run.sleep", seconds=0.2)))
    run = await ann.run("waiting")
    (slept,) = results(run)
    assert 0.2 <= slept["result"]["slept_seconds"] < 1.5
    assert names(await ann.log(run.run_id))[2:4] == ["tool_executing", "tool_completed"]
    assert run.epoch == 1


async def test_a_long_sleep_holds_nothing_and_wakes_in_time(ann: Caller, rows: Rows) -> None:
    await ann.register(waiting_agent(call("run.sleep", seconds="3s")))
    started = await ann.start("waiting")
    run = await waits(ann, started.run_id)
    assert await rows.as_owner("SELECT FROM state.leases WHERE run_id = $1", run.run_id) == []
    events = await ann.log(run.run_id)
    assert (events[-1].agent_waiting.wait_for, list(events[-1].agent_waiting.call_ids)) == (
        types_pb2.WAIT_KIND_TIMER,
        [f"{run.run_id}.2.0"],
    )
    run = await ann.end_of(run.run_id)
    (slept,) = results(run)
    assert 3 <= slept["result"]["slept_seconds"] < 4.5
    assert run.epoch == 2
    assert "run_recovered" not in names(await ann.log(run.run_id))


async def test_a_signal_wakes_the_run_and_is_taken_once(ann: Caller) -> None:
    await ann.register(
        scripted_agent(
            "waiting",
            step("Twice.", call("run.wait_for_signal", name="go"), call("run.wait_for_signal", name="go")),
            DONE,
        )
    )
    started = await ann.start("waiting")
    await waits(ann, started.run_id)
    request_id = new_id()
    for _ in range(2):
        await signal(ann, started.run_id, "go", {"n": 1}, request_id=request_id)
    await signal(ann, started.run_id, "stop")
    await ann.reached(started.run_id, "tool_completed")
    await signal(ann, started.run_id, "go", {"n": 2})
    run = await ann.end_of(started.run_id)
    assert [entry["result"] for entry in results(run)] == [
        {"name": "go", "data": {"n": n}, "by": ann.user_id} for n in (1, 2)
    ]
    assert names(await ann.log(run.run_id)).count("signal_received") == 3


async def test_a_signal_that_comes_before_it_is_awaited_is_kept(ann: Caller) -> None:
    await ann.register(
        scripted_agent(
            "waiting", step("Hm.", delay="500ms"), step("Now.", call("run.wait_for_signal", name="go")), DONE
        )
    )
    started = await ann.start("waiting")
    await signal(ann, started.run_id, "go", 7)
    run = await ann.end_of(started.run_id)
    assert [entry["result"]["data"] for entry in results(run)] == [7]
    assert run.epoch == 1


async def test_a_signal_that_does_not_come_times_out(ann: Caller) -> None:
    await ann.register(waiting_agent(call("run.wait_for_signal", name="go", timeout="300ms")))
    (entry,) = results(await ann.run("waiting"))
    assert (entry["status"], entry["error"]["reason"]) == ("timed_out", "TOOL_TIMED_OUT")


async def test_what_is_asked_of_others_goes_on_beside_a_wait(ann: Caller) -> None:
    await ann.register(
        waiting_agent(
            call("run.wait_for_signal", name="go"),
            call("diagnostics.echo", value=1),
            call("run.sleep", seconds=0.2),
            call("diagnostics.sleep", seconds=1),
        )
    )
    started = await ann.start("waiting")
    await waits(ann, started.run_id)
    events = await ann.log(started.run_id)
    assert [event.tool_completed.tool for event in events if event.HasField("tool_completed")] == [
        "diagnostics.echo",
        "run.sleep",
        "diagnostics.sleep",
    ]
    await signal(ann, started.run_id, "go")
    assert [entry["status"] for entry in results(await ann.end_of(started.run_id))] == ["ok"] * 4


@pytest.mark.parametrize(
    ("wanted", "path"),
    [
        (call("run.sleep"), "$"),
        (call("run.sleep", seconds="soon"), "$.seconds"),
        (call("run.sleep", until="tomorrow"), "$.until"),
        (call("run.wait_for_signal"), "$"),
        (call("human.ask", question="?", answer_schema={"type": "no type"}), "$.answer_schema"),
        (call("human.approve", title="?", role="nobody"), "$.role"),
    ],
)
async def test_bad_arguments_are_told_to_the_model(ann: Caller, wanted: Spec, path: str) -> None:
    await ann.register(waiting_agent(wanted))
    (entry,) = results(await ann.run("waiting"))
    assert entry["error"]["reason"] == "TOOL_ARGUMENTS_INVALID"
    assert f"at {path}:" in entry["error"]["message"]


async def test_leave_is_given_once_with_data_that_fits(ann: Caller) -> None:
    schema = {"type": "object", "properties": {"amount": {"type": "integer"}}, "required": ["amount"]}
    await ann.register(
        waiting_agent(call("human.approve", title="Pay?", arguments={"to": "Bob"}, answer_schema=schema))
    )
    started = await ann.start("waiting")
    approval_id = await asked(ann, started.run_id)
    assert await reason_of(resolve(ann, approval_id, ALLOW, data=b'{"amount":"much"}')) == "ANSWER_INVALID"
    assert await reason_of(resolve(ann, approval_id, ALLOW)) == "ANSWER_INVALID"
    assert await reason_of(resolve(ann, approval_id, ALLOW, data=b"no json")) == "REQUEST_INVALID"
    request_id = new_id()
    for _ in range(2):
        await resolve(ann, approval_id, ALLOW, data=b'{"amount":7}', request_id=request_id)
    assert await reason_of(resolve(ann, approval_id, DENY)) in ("APPROVAL_RESOLVED", "RUN_ENDED")
    run = await ann.end_of(started.run_id)
    (entry,) = results(run)
    assert entry["result"] == {"decision": "allow", "data": {"amount": 7}, "by": ann.user_id}
    assert names(await ann.log(run.run_id))[2:] == [
        "tool_executing",
        "approval_requested",
        "agent_waiting",
        "approval_resolved",
        "tool_completed",
        "agent_thinking",
        "agent_completed",
    ]


async def test_a_refusal_is_an_error_that_the_model_sees(ann: Caller) -> None:
    await ann.register(waiting_agent(call("human.ask", question="How much?")))
    started = await ann.start("waiting")
    await resolve(ann, await asked(ann, started.run_id), DENY)
    (entry,) = results(await ann.end_of(started.run_id))
    assert (entry["status"], entry["error"]["code"], entry["error"]["reason"]) == (
        "denied",
        "PERMISSION_DENIED",
        "APPROVAL_DENIED",
    )


async def test_a_question_that_nobody_answers_expires(ann: Caller) -> None:
    await ann.register(waiting_agent(call("human.approve", title="Now?", expires="1s")))
    started = await ann.start("waiting")
    run = await ann.end_of(started.run_id)
    (entry,) = results(run)
    assert (entry["status"], entry["error"]["reason"]) == ("denied", "APPROVAL_EXPIRED")
    resolved = next(
        event.approval_resolved for event in await ann.log(run.run_id) if event.HasField("approval_resolved")
    )
    assert (resolved.decision, resolved.by) == (types_pb2.APPROVAL_DECISION_EXPIRED, "")


async def test_only_who_has_the_role_answers(ann: Caller) -> None:
    await ann.register(waiting_agent(call("human.approve", title="Pay?", role="operator")))
    started = await ann.start("waiting")
    approval_id = await asked(ann, started.run_id)
    boss = ann.other_user()
    assert await reason_of(resolve(ann, approval_id, ALLOW)) == "ROLE_REQUIRED"
    assert await reason_of(resolve(boss, approval_id, ALLOW)) == "APPROVAL_NOT_FOUND"
    await resolve(boss, approval_id, ALLOW, role="operator")
    (entry,) = results(await ann.end_of(started.run_id))
    assert entry["result"]["by"] == boss.user_id


async def test_a_cancel_ends_a_waiting_run_and_withdraws_its_question(ann: Caller, rows: Rows) -> None:
    await ann.register(waiting_agent(call("human.approve", title="Pay?"), call("run.sleep", seconds=60)))
    started = await ann.start("waiting")
    approval_id = await asked(ann, started.run_id)
    await ann.execution.CancelRun(pb.CancelRunRequest(run_id=started.run_id), **ann.options())
    run = await ann.end_of(started.run_id)
    events = await ann.log(run.run_id)
    assert run.state == CANCELLED
    assert names(events)[-4:] == ["approval_resolved", "tool_completed", "tool_completed", "agent_cancelled"]
    assert events[-4].approval_resolved.decision == types_pb2.APPROVAL_DECISION_WITHDRAWN
    assert list(terminal(events).receipt) == []
    assert await reason_of(resolve(ann, approval_id, ALLOW)) == "RUN_ENDED"
    for table in ("leases", "ready"):
        assert await rows.as_owner(f"SELECT FROM state.{table} WHERE run_id = $1", run.run_id) == []


async def test_a_waiting_run_past_its_deadline_times_out(ann: Caller) -> None:
    await ann.register(waiting_agent(call("run.sleep", seconds=60), limits={"timeout": "3s"}))
    started = await ann.start("waiting")
    run = await ann.end_of(started.run_id)
    events = await ann.log(run.run_id)
    assert run.state == TIMED_OUT
    assert names(events)[-3:] == ["agent_waiting", "tool_completed", "agent_timed_out"]
    assert terminal(events).duration_ms < 6_000


async def test_explain_says_what_a_run_waits_for(ann: Caller) -> None:
    await ann.register(waiting_agent(call("human.approve", title="Pay?"), call("run.sleep", seconds=60)))
    started = await ann.start("waiting")
    approval_id = await asked(ann, started.run_id)
    request = pb.ExplainRunRequest(run_id=started.run_id)
    told = await ann.execution.ExplainRun(request, **ann.options("viewer"))
    kinds = {hold.kind: hold for hold in told.holds}
    assert kinds[types_pb2.HOLD_KIND_APPROVAL].approval_id == approval_id
    assert "Pay?" in kinds[types_pb2.HOLD_KIND_APPROVAL].detail
    assert kinds[types_pb2.HOLD_KIND_TIMER].HasField("until")
    assert told.executor_id == ""
    await ann.execution.CancelRun(pb.CancelRunRequest(run_id=started.run_id), **ann.options())
    await ann.end_of(started.run_id)
    told = await ann.execution.ExplainRun(request, **ann.options("viewer"))
    assert (told.run.state, list(told.holds)) == (CANCELLED, [])


async def test_fifty_waiting_runs_hold_no_lease(ann: Caller, rows: Rows) -> None:
    await ann.register(waiting_agent(call("run.wait_for_signal", name="go")))
    started = [await ann.start("waiting") for _ in range(50)]
    for one in started:
        await waits(ann, one.run_id)

    async def nothing_is_held() -> bool:
        return await rows.as_owner("SELECT FROM state.leases WHERE tenant_id = $1", ann.tenant_id) == []

    await wait_until(nothing_is_held, what="no lease")
    for one in started:
        await signal(ann, one.run_id, "go")
    for one in started:
        assert (await ann.end_of(one.run_id)).state == COMPLETED
