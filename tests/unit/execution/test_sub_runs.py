"""Sub-runs and handoffs as core decides them: what is made, what their ends mean, who goes on."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from mainspring.v1 import events_pb2, types_pb2
from mainspring_execution.core.decision import CallModel, CallTools, Close, Decision, Fail, HandOver, OpenWaits, Park
from mainspring_execution.core.decision import decide as decide_
from mainspring_execution.core.explain import explain
from mainspring_execution.core.progress import Progress, fold
from mainspring_execution.core.sub_runs import check_depth, hand_over, make_sub_run, settle_sub_run
from mainspring_kit.errors import MainspringError

from tests.unit.execution.samples import NOW, PURE, RUN_ID, Log, plan

pytestmark = pytest.mark.unit

SUB_RUN_ID = "01890a5d-ac96-774b-bcce-b302099a8058"
ROOT_RUN_ID = "01890a5d-ac96-774b-bcce-b302099a8059"
OK, ERROR = types_pb2.TOOL_STATUS_OK, types_pb2.TOOL_STATUS_ERROR
FAST = [{"agent": "helper", "on_failure": "fail_fast"}]


def asking(*tools: str) -> Log:
    """A run whose first step calls these."""
    return Log().think(1, wants=[(tool, {}) for tool in tools])


def call_id(index: int = 0) -> str:
    return f"{RUN_ID}.2.{index}"


def begin(log: Log, tool: str, index: int = 0, *, sub_run_id: str = "") -> Log:
    intent = events_pb2.ToolExecuting(call_id=call_id(index), tool=tool, effect=PURE, attempt=1, sub_run_id=sub_run_id)
    return log.add(tool_executing=intent)


def end(log: Log, tool: str, index: int = 0, *, status: types_pb2.ToolStatus.ValueType = OK) -> Log:
    error = None if status == OK else types_pb2.RunError(code="UNKNOWN", reason="SUB_RUN_FAILED")
    outcome = events_pb2.ToolCompleted(call_id=call_id(index), tool=tool, status=status, result=b"1", error=error)
    return log.add(tool_completed=outcome)


def handed_over(log: Log) -> Log:
    return log.add(agent_handed_off=events_pb2.AgentHandedOff(from_agent="lookup", to_agent="expert", to_version="2"))


def decide(log: Log, **spec: Any) -> Decision:
    return decide_(plan(**spec), fold(log.events), run_id=RUN_ID, now=NOW)


def test_a_run_parks_until_its_sub_runs_have_ended() -> None:
    log = asking("agent.helper")
    assert isinstance(decide(log), OpenWaits)
    parked = decide(begin(log, "agent.helper", sub_run_id=SUB_RUN_ID))
    assert isinstance(parked, Park)
    assert (parked.kind, parked.until, parked.call_ids) == (types_pb2.WAIT_KIND_RUN, None, (call_id(),))
    assert SUB_RUN_ID in parked.detail
    (hold,) = explain(fold(log.events), executor_id="", now=NOW)
    assert (hold.kind, list(hold.run_ids)) == (types_pb2.HOLD_KIND_SUB_RUN, [SUB_RUN_ID])
    assert isinstance(decide(end(log, "agent.helper")), CallModel)


def test_a_log_tells_which_sub_runs_may_not_have_been_made() -> None:
    def unmade(log: Log) -> dict[str, str]:
        return fold(log.events).unmade

    log = begin(asking("agent.helper", "agent.helper"), "agent.helper", sub_run_id=SUB_RUN_ID)
    begin(log, "agent.helper", 1, sub_run_id=ROOT_RUN_ID)
    assert unmade(log) == {call_id(0): SUB_RUN_ID, call_id(1): ROOT_RUN_ID}
    assert unmade(end(log, "agent.helper", 1, status=ERROR)) == {call_id(0): SUB_RUN_ID}
    assert fold(log.events).sub_runs() == [SUB_RUN_ID]
    # No run parks before they are made.
    assert unmade(log.add(agent_waiting=events_pb2.AgentWaiting())) == {}
    assert fold(log.events).sub_runs() == [SUB_RUN_ID]


def test_a_failure_ends_a_run_only_where_the_specification_says_so() -> None:
    log = begin(asking("agent.helper", "agent.other"), "agent.helper", sub_run_id=SUB_RUN_ID)
    end(begin(log, "agent.other", 1, sub_run_id=ROOT_RUN_ID), "agent.other", 1, status=ERROR)
    assert isinstance(decide(log, tools=FAST), Park)
    end(log, "agent.helper", status=ERROR)
    failed = decide(log, tools=FAST)
    assert isinstance(failed, Fail)
    assert failed.error.reason == "SUB_RUN_FAILED"
    assert isinstance(decide(log, tools=[{"agent": "helper"}]), CallModel)


def test_a_failure_before_a_handoff_does_not_concern_who_took_over() -> None:
    log = end(
        begin(asking("agent.helper", "handoff.expert"), "agent.helper", sub_run_id="s"), "agent.helper", status=ERROR
    )
    handed_over(end(begin(log, "handoff.expert", 1), "handoff.expert", 1))
    assert decide(log, tools=FAST) == CallModel(2)


def test_a_handoff_is_done_when_the_rest_of_its_step_is() -> None:
    log = asking("handoff.expert", "diagnostics.echo", "run.sleep")
    opened = decide(log)
    assert isinstance(opened, OpenWaits)
    assert [call.tool for call in opened.calls] == ["run.sleep"]
    begin(log, "run.sleep", 2)
    end(log, "run.sleep", 2)
    calling = decide(log)
    assert isinstance(calling, CallTools)
    assert [call.tool for call in calling.calls] == ["diagnostics.echo"]
    end(begin(log, "diagnostics.echo", 1), "diagnostics.echo", 1)
    handing = decide(log)
    assert isinstance(handing, HandOver)
    assert handing.call.call_id == call_id(0)


def test_a_handoff_beside_a_call_that_is_tried_again_later_waits_too() -> None:
    log = begin(asking("handoff.expert", "diagnostics.echo"), "diagnostics.echo", 1)
    failed = events_pb2.AttemptFailed(call_id=call_id(1), attempt=1)
    failed.retry_time.FromSeconds(int(NOW) + 60)
    parked = decide(log.add(attempt_failed=failed, safe_to_skip=True))
    assert isinstance(parked, Park)
    assert parked.call_ids == (call_id(1),)


def test_the_second_handoff_of_a_step_is_an_error() -> None:
    log = begin(asking("handoff.expert", "handoff.other"), "handoff.expert")
    closed = decide(handed_over(end(log, "handoff.expert")))
    assert isinstance(closed, Close)
    assert (closed.outcome.call_id, closed.outcome.error.reason) == (call_id(1), "HANDED_OFF")
    # One that could not be leaves the run to the next.
    log = end(begin(asking("handoff.expert", "handoff.other"), "handoff.expert"), "handoff.expert", status=ERROR)
    assert isinstance(decide(log), HandOver)


def test_an_agent_that_takes_over_has_its_own_steps() -> None:
    log = handed_over(end(begin(asking("handoff.expert"), "handoff.expert"), "handoff.expert"))
    progress = fold(log.events)
    assert (progress.agent, progress.agent_version, progress.agent_first_step) == ("expert", "2", 2)
    assert decide(log, limits={"max_steps": 1}) == CallModel(2)
    assert isinstance(decide(log.think(2), limits={"max_steps": 1}), Fail)
    # Nobody hands the run to and fro for ever.
    log.events[-1].agent_thinking.step = 1_000
    assert isinstance(decide(log), Fail)


def test_what_hands_over_says_to_whom_and_why() -> None:
    call = events_pb2.PlannedCall(call_id=call_id(), tool="handoff.lookup", arguments=b'{"reason":"hard","more":1}')
    outcome, handed = hand_over(call, from_agent="help", to=plan())
    assert orjson.loads(outcome.result) == {"agent": "lookup", "version": "3"}
    assert (handed.from_agent, handed.to_agent, handed.to_version, handed.reason) == ("help", "lookup", "3", "hard")
    for arguments in (b"[]", b"{"):
        call.arguments = arguments
        with pytest.raises(MainspringError, match=r"handoff\.lookup"):
            hand_over(call, from_agent="help", to=plan())


def parent(*, depth: int = 0, seconds_left: float = 0.0) -> types_pb2.Run:
    run = types_pb2.Run(run_id=RUN_ID, root_run_id=ROOT_RUN_ID if depth else "", depth=depth)
    if seconds_left:
        run.deadline.FromMicroseconds(int((NOW + seconds_left) * 1e6))
    return run


@pytest.mark.parametrize(("seconds_left", "seconds"), [(0.0, 30.0), (10.0, 10.0), (60.0, 30.0)])
def test_a_sub_run_has_no_more_time_than_its_parent(seconds_left: float, seconds: float) -> None:
    intent = events_pb2.ToolExecuting(call_id=call_id(), sub_run_id=SUB_RUN_ID, arguments=b'{"value":7}')
    create, started, run = make_sub_run(
        parent(depth=2, seconds_left=seconds_left),
        intent,
        plan=plan(limits={"timeout": "30s"}),
        session_id="talk",
        user_id="ann",
        trace_id="t",
        executor_id="e1",
        now=NOW,
    )
    assert create.deadline.seconds == run.deadline.seconds == int(NOW + seconds)
    assert (create.parent_run_id, create.root_run_id, create.parent_call_id, create.depth) == (
        RUN_ID,
        ROOT_RUN_ID,
        call_id(),
        3,
    )
    assert (create.input, create.user_id, create.session_id) == (b'{"value":7}', "ann", "talk")
    assert (started.run_id, started.parent_run_id, started.root_run_id) == (SUB_RUN_ID, RUN_ID, ROOT_RUN_ID)
    assert (run.run_id, run.depth, run.epoch) == (SUB_RUN_ID, 3, 1)
    assert not (create.idempotency_key or create.caps or create.queue_only)


def test_only_a_call_of_an_agent_goes_deeper() -> None:
    call = events_pb2.PlannedCall(tool="agent.helper")
    assert check_depth(call, parent(depth=9)) is None
    assert check_depth(events_pb2.PlannedCall(tool="run.sleep"), parent(depth=10)) is None
    refusal = check_depth(call, parent(depth=10))
    assert refusal is not None
    assert (refusal.reason_name, refusal.metadata) == ("DEPTH_EXCEEDED", {"agent": "helper", "depth": "11"})


@pytest.mark.parametrize(
    ("state", "error", "status", "code", "sub_reason"),
    [
        ("FAILED", types_pb2.RunError(code="INTERNAL", reason="MODEL_FAILED"), "ERROR", "INTERNAL", "MODEL_FAILED"),
        ("CANCELLED", None, "CANCELLED", "CANCELLED", "RUN_CANCELLED"),
        (
            "TIMED_OUT",
            types_pb2.RunError(code="DEADLINE_EXCEEDED", reason="RUN_TIMED_OUT"),
            "TIMED_OUT",
            "DEADLINE_EXCEEDED",
            "RUN_TIMED_OUT",
        ),
    ],
)
def test_a_bad_end_is_an_error_of_the_call(
    state: str, error: types_pb2.RunError | None, status: str, code: str, sub_reason: str
) -> None:
    intent = events_pb2.ToolExecuting(call_id=call_id(), tool="agent.helper", sub_run_id=SUB_RUN_ID)
    run = types_pb2.Run(run_id=SUB_RUN_ID, state=types_pb2.RunState.Value(f"RUN_STATE_{state}"), error=error)
    outcome = settle_sub_run(Progress(), intent, run=run, now=NOW)
    assert types_pb2.ToolStatus.Name(outcome.status) == f"TOOL_STATUS_{status}"
    assert (outcome.error.code, outcome.error.reason) == (code, "SUB_RUN_FAILED")
    assert dict(outcome.error.metadata) == {"agent": "helper", "sub_run_id": SUB_RUN_ID, "sub_reason": sub_reason}


def test_a_good_end_is_the_result_as_it_is() -> None:
    intent = events_pb2.ToolExecuting(call_id=call_id(), tool="agent.helper", sub_run_id=SUB_RUN_ID)
    run = types_pb2.Run(run_id=SUB_RUN_ID, state=types_pb2.RUN_STATE_COMPLETED, result=b'{"n": 1.50}')
    outcome = settle_sub_run(Progress(), intent, run=run, now=NOW)
    assert (outcome.status, outcome.result) == (OK, b'{"n": 1.50}')
