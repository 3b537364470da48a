"""What a run is doing, or why it does not go on, as its log tells."""

from __future__ import annotations

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from mainspring.v1 import events_pb2, types_pb2
from mainspring_execution.core.explain import explain, merge
from mainspring_execution.core.progress import fold
from mainspring_execution.core.unknown import make_question
from mainspring_execution.core.waits import open_wait

from tests.unit.execution.samples import NOW, RUN_ID, Log

pytestmark = pytest.mark.unit

CALL_ID = f"{RUN_ID}.2.0"
LATER = Timestamp(seconds=int(NOW) + 9)


def holds(log: Log, executor_id: str = "e1") -> list[types_pb2.Hold]:
    return explain(fold(log.events), executor_id=executor_id, now=NOW)


def kinds(log: Log, executor_id: str = "e1") -> list[str]:
    return [types_pb2.HoldKind.Name(hold.kind).removeprefix("HOLD_KIND_") for hold in holds(log, executor_id)]


def test_a_model_step_or_a_call_is_under_way() -> None:
    assert kinds(Log()) == ["MODEL"]
    (hold,) = holds(Log().think(1, calls=1).intend())
    assert (hold.kind, hold.call_id) == (types_pb2.HOLD_KIND_TOOL, CALL_ID)
    assert "diagnostics.echo" in hold.detail
    assert "e1" in hold.detail


def test_between_two_executors_nothing_is_under_way() -> None:
    assert kinds(Log(), "") == []
    assert "nobody" in holds(Log().think(1, calls=1).intend(), "")[0].detail


@pytest.mark.parametrize(
    ("tool", "arguments", "kind"),
    [
        ("run.sleep", {"seconds": 9}, "TIMER"),
        ("run.wait_for_signal", {"name": "go"}, "SIGNAL"),
        ("human.approve", {"title": "Pay?", "expires": 9}, "APPROVAL"),
    ],
)
def test_a_wait_says_what_it_waits_for(tool: str, arguments: dict[str, object], kind: str) -> None:
    log = Log().think(1, wants=[(tool, arguments)])
    (call,) = fold(log.events).open_calls()
    intent, question = open_wait(call, now=NOW)
    log.add(tool_executing=intent)
    if question is not None:
        question.approval_id = "a"
        log.add(approval_requested=question)
    assert kinds(log) == [kind]
    (hold,) = holds(log)
    assert hold.until == (LATER if kind != "SIGNAL" else Timestamp())
    assert hold.approval_id == ("a" if question is not None else "")


def test_a_lost_unsafe_call_waits_for_a_person() -> None:
    log = Log().think(1, calls=1).intend(types_pb2.EFFECT_CLASS_UNSAFE).recover()
    (intent,) = fold(log.events).intents.values()
    assert kinds(log.add(approval_requested=make_question(intent))) == ["APPROVAL"]


def test_a_paused_run_says_so_alone() -> None:
    log = Log().think(1, calls=1).intend().add(agent_paused=events_pb2.AgentPaused())
    assert kinds(log) == ["PAUSED"]


@pytest.mark.parametrize(
    ("reason", "kind"),
    [("PEER_UNAVAILABLE", "BACKOFF"), ("WORKER_UNAVAILABLE", "NO_WORKER"), ("MODEL_FAILED", "BACKOFF")],
)
def test_a_failed_attempt_says_why_and_until_when(reason: str, kind: str) -> None:
    error = types_pb2.RunError(reason=reason, message="out of order")
    of_call = events_pb2.AttemptFailed(call_id=CALL_ID, attempt=1, error=error, retry_time=LATER)
    of_step = events_pb2.AttemptFailed(step=1, attempt=1, error=error, retry_time=LATER)
    for log in (Log().think(1, calls=1).intend().add(attempt_failed=of_call), Log().add(attempt_failed=of_step)):
        assert kinds(log) == [kind]
        (hold,) = holds(log)
        assert (hold.until, "out of order" in hold.detail) == (LATER, True)


def test_an_attempt_that_is_due_is_under_way() -> None:
    now = Timestamp(seconds=int(NOW))
    log = Log().think(1, calls=1).intend()
    assert kinds(log.add(attempt_failed=events_pb2.AttemptFailed(call_id=CALL_ID, retry_time=now))) == ["TOOL"]


def test_what_the_database_knows_comes_first_and_only_once() -> None:
    line = types_pb2.Hold(kind=types_pb2.HOLD_KIND_SESSION_LINE)
    timer = types_pb2.Hold(kind=types_pb2.HOLD_KIND_TIMER, detail="database")
    told = [
        types_pb2.Hold(kind=types_pb2.HOLD_KIND_TIMER, detail="log"),
        types_pb2.Hold(kind=types_pb2.HOLD_KIND_SIGNAL),
    ]
    assert merge([line, timer], told) == [line, timer, told[1]]
