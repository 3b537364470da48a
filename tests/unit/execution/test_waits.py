"""Calls that only wait: what they ask for, when they are over, and what a run does beside and after them."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from mainspring.v1 import events_pb2, types_pb2
from mainspring_execution.core.decision import CallModel, CallTools, Close, Expire, OpenWaits, Park
from mainspring_execution.core.intrinsic import TOOLS, is_intrinsic
from mainspring_execution.core.progress import fold
from mainspring_execution.core.schema import schema_fault
from mainspring_execution.core.waits import open_wait, wake_time
from mainspring_kit.errors import MainspringError

from tests.unit.execution.samples import NOW, PURE, RUN_ID, Log

pytestmark = pytest.mark.unit

CALL_ID = f"{RUN_ID}.2.0"
APPROVAL_ID = f"{RUN_ID}.4"
ALLOW, DENY = types_pb2.APPROVAL_DECISION_ALLOW, types_pb2.APPROVAL_DECISION_DENY
EXPIRED = types_pb2.APPROVAL_DECISION_EXPIRED
TIMER, SIGNAL = types_pb2.WAIT_KIND_TIMER, types_pb2.WAIT_KIND_SIGNAL
APPROVAL = types_pb2.WAIT_KIND_APPROVAL


def moment(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMicroseconds(int(seconds * 1e6))
    return stamp


def planned(tool: str, **arguments: Any) -> events_pb2.PlannedCall:
    return events_pb2.PlannedCall(call_id=CALL_ID, tool=tool, arguments=orjson.dumps(arguments))


def opened(*wants: tuple[str, dict[str, Any]]) -> Log:
    """A log whose first step plans calls that wait, all of them begun at the moment NOW."""
    log = Log().think(1, wants=wants)
    decision = log.decision()
    assert isinstance(decision, OpenWaits)
    for call in decision.calls:
        intent, question = open_wait(call, now=NOW)
        log.add(tool_executing=intent, event_time=moment(NOW))
        if question is not None:
            question.approval_id = f"{RUN_ID}.{len(log.events) + 1}"
            log.add(approval_requested=question)
    return log


def closed(log: Log, now: float = NOW) -> events_pb2.ToolCompleted:
    decision = log.decision_at(now)
    assert isinstance(decision, Close)
    return decision.outcome


def answer(decision: types_pb2.ApprovalDecision.ValueType, data: bytes = b"") -> events_pb2.ApprovalResolved:
    return events_pb2.ApprovalResolved(
        approval_id=APPROVAL_ID, decision=decision, data=data, by="" if decision == EXPIRED else "boss"
    )


def signal(name: str, data: bytes = b"") -> events_pb2.SignalReceived:
    return events_pb2.SignalReceived(name=name, data=data, by="ann", request_id=f"{name}-1")


def test_only_what_execution_serves_itself_is_intrinsic() -> None:
    assert all(is_intrinsic(tool) for tool in (*TOOLS, "agent.x", "handoff.y"))
    assert not any(is_intrinsic(tool) for tool in ("diagnostics.sleep", "runner.sleep", "humane.ask", "agents.x"))


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [({"seconds": 5}, 5), ({"seconds": "1.5m"}, 90), ({"seconds": 0}, 0), ({"until": "2027-01-15T09:00:00+01:00"}, 0)],
)
def test_a_sleep_is_over_at_its_time(arguments: dict[str, Any], seconds: float) -> None:
    log = opened(("run.sleep", arguments))
    if seconds:
        assert log.decision_at(NOW + seconds - 0.001) == Park(NOW + seconds, TIMER, "a sleep", (CALL_ID,))
    outcome = closed(log, NOW + seconds)
    assert orjson.loads(outcome.result) == {"slept_seconds": seconds}
    assert outcome.duration_ms == pytest.approx(seconds * 1_000, abs=0.01)


@pytest.mark.parametrize(
    ("tool", "arguments", "path"),
    [
        ("run.sleep", {}, "$"),
        ("run.sleep", {"seconds": 1, "until": "2027-01-15T09:00:00Z"}, "$"),
        ("run.sleep", {"seconds": -1}, "$.seconds"),
        ("run.sleep", {"seconds": "soon"}, "$.seconds"),
        ("run.sleep", {"seconds": True}, "$.seconds"),
        ("run.sleep", {"seconds": 1e9}, "$.seconds"),
        ("run.sleep", {"secs": 1}, "$"),
        ("run.sleep", {"until": "tomorrow"}, "$.until"),
        ("run.sleep", {"until": "2027-01-15T09:00:00"}, "$.until"),
        ("run.sleep", {"until": "9999-01-15T09:00:00Z"}, "$.until"),
        ("run.wait_for_signal", {}, "$"),
        ("run.wait_for_signal", {"name": ""}, "$.name"),
        ("run.wait_for_signal", {"name": "go", "timeout": "x"}, "$.timeout"),
        ("human.approve", {}, "$"),
        ("human.approve", {"title": "t" * 1001}, "$.title"),
        ("human.approve", {"title": "t", "role": "boss"}, "$.role"),
        ("human.ask", {"question": "?", "answer_schema": {"type": "no type"}}, "$.answer_schema"),
        ("human.ask", {"question": "?", "answer_schema": {"enum": ["x" * (16 << 10)]}}, "$.answer_schema"),
    ],
)
def test_bad_arguments_are_named(tool: str, arguments: dict[str, Any], path: str) -> None:
    with pytest.raises(MainspringError) as raised:
        open_wait(planned(tool, **arguments), now=NOW)
    assert (raised.value.reason_name, raised.value.metadata) == (
        "TOOL_ARGUMENTS_INVALID",
        {"tool": tool, "path": path},
    )


def test_arguments_that_are_no_json_are_told_so() -> None:
    with pytest.raises(MainspringError, match="not JSON"):
        open_wait(events_pb2.PlannedCall(tool="run.sleep", arguments=b"{"), now=NOW)


def test_an_intrinsic_tool_that_there_is_not_is_not_found() -> None:
    with pytest.raises(MainspringError) as raised:
        open_wait(planned("run.away"), now=NOW)
    assert raised.value.reason_name == "TOOL_NOT_FOUND"


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/x"},
        {"properties": {"a": {"$dynamicRef": "#x"}}},
        {"unevaluatedProperties": False},
        {"type": "thing"},
        {"pattern": "(?=x)"},
        {"items": [1]},
        {"patternProperties": {"(a)\\1": {}}},
    ],
)
def test_a_schema_of_a_models_own_says_no_more_than_can_be_checked(schema: dict[str, Any]) -> None:
    assert schema_fault(schema)


def test_a_schema_of_a_models_own_may_be_of_any_other_kind() -> None:
    assert not schema_fault({"type": "object", "properties": {"a": {"pattern": "^x+$"}}, "required": ["a"]})


def test_a_signal_ends_the_wait_for_its_name_alone() -> None:
    log = opened(("run.wait_for_signal", {"name": "go", "timeout": 5}))
    assert log.decision() == Park(NOW + 5, SIGNAL, "the signal go", (CALL_ID,))
    log.add(signal_received=signal("stop"))
    assert isinstance(log.decision(), Park)
    log.add(signal_received=signal("go", b'{"n":1}'))
    outcome = closed(log)
    assert orjson.loads(outcome.result) == {"name": "go", "data": {"n": 1}, "by": "ann"}
    log.add(tool_completed=outcome)
    assert [kept.name for kept in fold(log.events).signals] == ["stop"]
    assert log.decision() == CallModel(2)


def test_two_waits_take_two_signals_in_the_order_of_both() -> None:
    log = opened(("run.wait_for_signal", {"name": "go"}), ("run.wait_for_signal", {"name": "go"}))
    log.add(signal_received=signal("go", b"1")).add(signal_received=signal("go", b"2"))
    for index, data in enumerate((1, 2)):
        outcome = closed(log)
        assert (outcome.call_id, orjson.loads(outcome.result)["data"]) == (f"{RUN_ID}.2.{index}", data)
        log.add(tool_completed=outcome)


def test_a_wait_without_end_has_no_time() -> None:
    log = opened(("run.wait_for_signal", {"name": "go"}))
    assert log.decision() == Park(None, SIGNAL, "the signal go", (CALL_ID,))


def test_a_signal_that_does_not_come_in_time_is_an_error_of_its_tool() -> None:
    outcome = closed(opened(("run.wait_for_signal", {"name": "go", "timeout": "5s"})), NOW + 5)
    assert outcome.status == types_pb2.TOOL_STATUS_TIMED_OUT
    assert (outcome.error.reason, outcome.error.metadata["timeout_seconds"]) == ("TOOL_TIMED_OUT", "5")


def test_a_signal_counts_also_when_the_time_is_over() -> None:
    log = opened(("run.wait_for_signal", {"name": "go", "timeout": 5})).add(signal_received=signal("go"))
    assert closed(log, NOW + 9).status == types_pb2.TOOL_STATUS_OK


def test_a_person_is_asked_what_the_arguments_say() -> None:
    schema = {"type": "object", "required": ["n"]}
    intent, question = open_wait(
        planned(
            "human.approve",
            title="Pay?",
            arguments={"to": "Bob", "amount": 1},
            answer_schema=schema,
            expires="1h",
            role="admin",
        ),
        now=NOW,
    )
    assert question is not None
    assert (question.title, question.role, question.call_id) == ("Pay?", "admin", CALL_ID)
    assert question.arguments == b'{"amount":1,"to":"Bob"}'
    assert orjson.loads(question.answer_schema) == schema
    assert question.expires_time == intent.wake_time
    assert wake_time(intent) == NOW + 3_600
    assert intent.effect == PURE


@pytest.mark.parametrize(
    ("tool", "arguments", "result"),
    [
        ("human.approve", {"title": "Pay?"}, {"decision": "allow", "data": {"n": 1}, "by": "boss"}),
        ("human.ask", {"question": "How much?"}, {"data": {"n": 1}, "by": "boss"}),
    ],
)
def test_an_answer_is_the_result(tool: str, arguments: dict[str, Any], result: dict[str, Any]) -> None:
    log = opened((tool, arguments))
    decision = log.decision()
    assert isinstance(decision, Park)
    assert (decision.until, decision.kind) == (None, APPROVAL)
    assert next(iter(arguments.values())) in decision.detail
    log.add(approval_resolved=answer(ALLOW, b'{"n":1}'))
    assert orjson.loads(closed(log).result) == result


@pytest.mark.parametrize(("decision", "reason"), [(DENY, "APPROVAL_DENIED"), (EXPIRED, "APPROVAL_EXPIRED")])
def test_a_refusal_is_an_error(decision: types_pb2.ApprovalDecision.ValueType, reason: str) -> None:
    log = opened(("human.ask", {"question": "?"})).add(approval_resolved=answer(decision, b'"too dear"'))
    outcome = closed(log)
    assert (outcome.status, outcome.error.code, outcome.error.reason) == (
        types_pb2.TOOL_STATUS_DENIED,
        "PERMISSION_DENIED",
        reason,
    )
    assert outcome.error.metadata["data"] == '"too dear"'


def test_a_question_whose_time_is_over_expires() -> None:
    log = opened(("human.approve", {"title": "?", "expires": 60}))
    assert isinstance(log.decision_at(NOW + 59.9), Park)
    assert log.decision_at(NOW + 60) == Expire(APPROVAL_ID)


def test_other_calls_go_on_beside_a_wait_and_tell_when_it_is_over() -> None:
    log = opened(("run.sleep", {"seconds": 60}), ("diagnostics.echo", {}), ("run.wait_for_signal", {"name": "go"}))
    decision = log.decision()
    assert isinstance(decision, CallTools)
    assert ([call.tool for call in decision.calls], decision.until) == (["diagnostics.echo"], NOW + 60)
    log.intend().complete()
    decision = log.decision()
    assert isinstance(decision, Park)
    assert decision.call_ids == (CALL_ID, f"{RUN_ID}.2.2")


def test_a_paused_run_does_nothing_before_it_is_resumed() -> None:
    log = Log().add(agent_paused=events_pb2.AgentPaused(request_id="p"))
    assert log.decision() == Park()
    log.add(agent_resumed=events_pb2.AgentResumed(request_id="r"))
    assert log.decision() == CallModel(1)
    assert fold(log.events).requests == {"p", "r"}


def test_a_wait_is_nothing_that_a_takeover_finds_lost() -> None:
    progress = fold(opened(("run.sleep", {"seconds": 60})).events)
    assert (progress.lost_calls(), progress.begun_calls()) == ([], [CALL_ID])


def test_a_step_or_call_that_is_tried_again_later_is_waited_for() -> None:
    failed = events_pb2.AttemptFailed(step=1, attempt=1, retry_time=moment(NOW + 9))
    log = Log().add(attempt_failed=failed)
    assert log.decision() == Park(NOW + 9, TIMER, "the next attempt at model step 1")
    assert log.decision_at(NOW + 9) == CallModel(1)
    log = Log().think(1, calls=2).intend().intend()
    log.add(attempt_failed=events_pb2.AttemptFailed(call_id=CALL_ID, attempt=1, retry_time=moment(NOW + 9)))
    decision = log.decision()
    assert isinstance(decision, CallTools)
    assert ([call.call_id for call in decision.calls], decision.until) == ([f"{RUN_ID}.2.1"], NOW + 9)
    log.add(tool_completed=events_pb2.ToolCompleted(call_id=f"{RUN_ID}.2.1", status=types_pb2.TOOL_STATUS_OK))
    assert log.decision() == Park(NOW + 9, TIMER, "the next attempt at diagnostics.echo", (CALL_ID,))


def test_what_was_handed_back_counts_as_no_death() -> None:
    log = Log().think(1)
    for _ in range(5):
        log.add(run_recovered=events_pb2.RunRecovered(attempt=1, handed_back=True))
    progress = fold(log.events)
    assert (progress.recoveries, progress.recoveries_in_a_row) == (5, 0)
