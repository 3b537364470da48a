"""An unsafe call of which nobody knows what it did: a person is asked once for each attempt, and the answer holds."""

from __future__ import annotations

import orjson
import pytest
from mainspring.v1 import events_pb2, types_pb2
from mainspring_execution.core.control import check_answer
from mainspring_execution.core.decision import CallTools, Close, Park, decide
from mainspring_execution.core.progress import fold
from mainspring_execution.core.unknown import Ask, make_question
from mainspring_kit.errors import MainspringError

from tests.unit.execution.samples import NOW, RUN_ID, Log, plan

pytestmark = pytest.mark.unit

CALL_ID = f"{RUN_ID}.2.0"
UNSAFE = types_pb2.EFFECT_CLASS_UNSAFE
ALLOW, DENY = types_pb2.APPROVAL_DECISION_ALLOW, types_pb2.APPROVAL_DECISION_DENY


def lost() -> Log:
    return Log().think(1, calls=1).intend(UNSAFE).recover()


def ask(log: Log) -> Log:
    decision = log.decision()
    assert isinstance(decision, Ask)
    question = make_question(decision.intent)
    question.approval_id = f"{RUN_ID}.{len(log.events) + 1}"
    return log.add(approval_requested=question)


def answer(log: Log, decision: types_pb2.ApprovalDecision.ValueType, data: bytes = b"") -> Log:
    (asked,) = fold(log.events).approvals.values()
    return log.add(
        approval_resolved=events_pb2.ApprovalResolved(approval_id=asked.approval_id, decision=decision, data=data)
    )


def test_a_person_is_asked_and_the_run_waits() -> None:
    log = ask(lost())
    decision = log.decision()
    assert isinstance(decision, Park)
    assert (decision.kind, decision.until, decision.call_ids) == (types_pb2.WAIT_KIND_APPROVAL, None, (CALL_ID,))
    assert "diagnostics.echo" in decision.detail


def test_leave_to_retry_makes_the_call_again() -> None:
    decision = answer(ask(lost()), ALLOW, b'{"action":"retry"}').decision()
    assert isinstance(decision, CallTools)
    assert decision.calls[0].call_id == CALL_ID


def test_leave_to_retry_holds_for_one_attempt() -> None:
    log = answer(ask(lost()), ALLOW, b'{"action":"retry"}').recover()
    assert isinstance(log.decision(), Ask)
    log = answer(ask(log), ALLOW, b'{"action":"retry"}')
    assert isinstance(log.decision(), CallTools)
    # As when its worker dies: the executor that saw it asks at once.
    (intent,) = fold(log.events).intents.values()
    log.add(approval_requested=make_question(intent))
    assert isinstance(log.decision(), Park)


def test_leave_to_retry_outlives_an_executor_that_left_in_order() -> None:
    log = answer(ask(lost()), ALLOW, b'{"action":"retry"}')
    log.add(run_recovered=events_pb2.RunRecovered(attempt=1, handed_back=True, lost_calls=[CALL_ID]))
    assert isinstance(log.decision(), CallTools)


def test_a_result_that_is_given_is_the_calls_own() -> None:
    decision = answer(ask(lost()), ALLOW, b'{"action":"result","result":{"paid":true}}').decision()
    assert isinstance(decision, Close)
    assert decision.outcome.status == types_pb2.TOOL_STATUS_OK
    assert orjson.loads(decision.outcome.result) == {"paid": True}


@pytest.mark.parametrize(("decision", "data"), [(ALLOW, b'{"action":"fail"}'), (DENY, b""), (ALLOW, b"")])
def test_a_call_that_shall_fail_is_an_error_that_the_model_sees(
    decision: types_pb2.ApprovalDecision.ValueType, data: bytes
) -> None:
    outcome = answer(ask(lost()), decision, data).decision()
    assert isinstance(outcome, Close)
    assert outcome.outcome.status == types_pb2.TOOL_STATUS_ERROR
    assert (outcome.outcome.error.reason, outcome.outcome.error.metadata["call_id"]) == ("WORKER_LOST", CALL_ID)


def test_other_calls_of_the_step_go_on_meanwhile() -> None:
    log = Log().think(1, calls=2).intend(UNSAFE).intend().recover()
    decision = ask(log).decision()
    assert isinstance(decision, CallTools)
    assert [call.call_id for call in decision.calls] == [f"{RUN_ID}.2.1"]


def test_a_call_that_failed_here_and_waits_for_its_next_attempt_is_not_lost() -> None:
    progress = fold(Log().think(1, calls=1).intend(UNSAFE).events)
    assert isinstance(decide(plan(), progress, run_id=RUN_ID, now=NOW, under_way={CALL_ID}), CallTools)


def test_an_answer_is_checked_against_the_question() -> None:
    (intent,) = fold(lost().events).intents.values()
    asked = make_question(intent)
    approval = types_pb2.Approval(approval_id="a", answer_schema=asked.answer_schema)
    for data in (b'{"action":"retry"}', b'{"action":"result","result":null}', b'{"action":"fail"}'):
        assert check_answer(approval, ALLOW, data=data) == data
    assert check_answer(approval, DENY, data=b"") == b""
    for data in (b"", b'{"action":"pray"}', b'{"action":"result"}', b'{"action":"retry","x":1}'):
        with pytest.raises(MainspringError) as raised:
            check_answer(approval, ALLOW, data=data)
        assert (raised.value.reason_name, raised.value.metadata["approval_id"]) == ("ANSWER_INVALID", "a")
    with pytest.raises(MainspringError, match="not JSON"):
        check_answer(approval, DENY, data=b"{")
