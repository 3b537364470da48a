"""Which appends are legal, what they do to their run, and what their senders are told otherwise."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from mainspring.v1 import events_pb2, state_pb2, types_pb2
from mainspring_kit.errors import MainspringError
from mainspring_state.core import append as core
from mainspring_state.core import refusals

from tests.unit.state.samples import APPEND, RUN, append, completed, create, event, started, thinking

pytestmark = pytest.mark.unit

FAILED = events_pb2.AgentFailed(
    error=types_pb2.RunError(code="ABORTED", reason="X", message="no", metadata={"k": "v"}),
    stages=[types_pb2.Stage(name="initialization", duration_ms=1.5)],
    usage=types_pb2.Usage(input_tokens=3),
)


def refused(asked: state_pb2.Append) -> MainspringError:
    with pytest.raises(MainspringError) as raised:
        core.check(asked)
    return raised.value


def allowed_from(entry: core.Entry) -> set[int]:
    return {state for state in range(16) if entry.from_states >> state & 1}


def test_a_create_leads_to_running() -> None:
    entry = core.check(create())
    assert (entry.is_create, entry.types, entry.to_state, entry.ending) == (
        True,
        ("agent_started",),
        core.RUNNING,
        None,
    )


def test_steps_need_a_run_under_way_and_have_it_running() -> None:
    entry = core.check(append(thinking(2), event(3, tool_executing=events_pb2.ToolExecuting(call_id="c"))))
    assert allowed_from(entry) == {core.RUNNING, core.WAITING}
    assert entry.to_state == core.RUNNING
    assert entry.is_progress


def test_a_recovery_alone_is_no_progress() -> None:
    recovered = event(4, run_recovered=events_pb2.RunRecovered(attempt=1))
    assert not core.check(append(recovered)).is_progress
    assert core.check(append(recovered, thinking(5))).is_progress


@pytest.mark.parametrize(
    ("payload", "state"),
    [
        ({"agent_failed": events_pb2.AgentFailed()}, core.FAILED),
        ({"agent_cancelled": events_pb2.AgentCancelled()}, core.CANCELLED),
        ({"agent_timed_out": events_pb2.AgentTimedOut()}, core.TIMED_OUT),
    ],
)
def test_a_run_can_be_ended_from_every_state_but_an_end(payload: dict[str, Any], state: int) -> None:
    entry = core.check(append(event(1, **payload)))
    assert allowed_from(entry) == {core.QUEUED, core.RUNNING, core.WAITING, core.PAUSED}
    assert entry.to_state == state


def test_only_a_running_run_completes() -> None:
    assert allowed_from(core.check(append(completed(4)))) == {core.RUNNING}


def test_an_end_gives_the_row_its_result_stages_and_usage() -> None:
    done = events_pb2.AgentCompleted(
        result=b'{"a": 1}',
        stages=[types_pb2.Stage(name="completion", duration_ms=0.25)],
        usage=types_pb2.Usage(output_tokens=7, cost_usd=0.5),
    )
    ending = core.check(append(event(5, agent_completed=done))).ending
    assert ending is not None
    assert (ending.result, ending.error) == (b'{"a": 1}', None)
    assert orjson.loads(ending.stages) == [{"name": "completion", "duration_ms": 0.25}]
    assert orjson.loads(ending.usage) == {"input_tokens": 0, "output_tokens": 7, "cost_usd": 0.5}


def test_a_failure_gives_the_row_its_error() -> None:
    ending = core.check(append(event(5, agent_failed=FAILED))).ending
    assert ending is not None and ending.error is not None and ending.result is None
    assert orjson.loads(ending.error) == {"code": "ABORTED", "reason": "X", "message": "no", "metadata": {"k": "v"}}


@pytest.mark.parametrize(
    "asked",
    [
        append(thinking(1)),
        append(completed(1)),
        append(started(2)),
        append(completed(4), thinking(5)),
        append(completed(4), event(5, agent_failed=FAILED)),
    ],
    ids=["begins with a step", "begins with a result", "starts twice", "goes on after its end", "ends twice"],
)
def test_an_impossible_order_of_events_is_refused(asked: state_pb2.Append) -> None:
    assert refused(asked).reason_name == "TRANSITION_ILLEGAL"


def test_an_append_of_nothing_or_too_much_is_refused() -> None:
    assert refused(append()).metadata["field"] == "events"
    assert refused(append(*(thinking(seq) for seq in range(2, 67)))).metadata["field"] == "events"
    assert len(core.check(append(*(thinking(seq) for seq in range(2, 66)))).types) == 64


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tenant_id": ""}, "tenant_id"),
        ({"run_id": "nonsense"}, "run_id"),
        ({"run_id": RUN.upper()}, "run_id"),
        ({"append_id": ""}, "append_id"),
        ({"expected_seq": 7}, "events.seq"),
    ],
)
def test_a_malformed_append_is_refused(change: dict[str, object], field: str) -> None:
    asked = append(thinking(2))
    for name, value in change.items():
        setattr(asked, name, value)
    error = refused(asked)
    assert (error.reason_name, error.metadata["field"]) == ("REQUEST_INVALID", field)


def test_an_event_of_another_run_or_without_payload_is_refused() -> None:
    other = thinking(2)
    other.run_id = APPEND
    assert refused(append(other)).metadata["field"] == "events.run_id"
    assert refused(append(event(2))).metadata["field"] == "events"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"user_id": ""}, "create.user_id"),
        ({"session_id": "s" * 129}, "create.session_id"),
        ({"executor_id": ""}, "create.executor_id"),
        ({"idempotency_key": "k" * 129}, "create.idempotency_key"),
        ({"policy": 77}, "create.policy"),
        ({"idempotency_key": "a\0b"}, "create.idempotency_key"),
        ({"agent": "\0"}, "create.agent"),
    ],
)
def test_a_malformed_create_is_refused(change: dict[str, Any], field: str) -> None:
    asked = create()
    for name, value in change.items():
        setattr(asked.create, name, value)
    assert refused(asked).metadata["field"] == field


def test_a_create_with_a_deadline_that_no_calendar_has_is_refused() -> None:
    asked = create()
    asked.create.deadline.seconds = 1 << 40
    assert refused(asked).metadata["field"] == "create.deadline"


def test_a_create_has_exactly_one_start() -> None:
    asked = create()
    asked.events.append(thinking(2))
    assert refused(asked).metadata["field"] == "create"


def test_an_oversized_event_is_refused_with_its_bound() -> None:
    error = refused(
        append(event(2, agent_thinking=events_pb2.AgentThinking(text="x" * (refusals.EVENT_BYTES_MAX + 1))))
    )
    assert error.reason_name == "PAYLOAD_TOO_LARGE"
    assert error.metadata["limit"] == str(refusals.EVENT_BYTES_MAX)


def test_a_stamp_says_when_by_which_append_and_for_whom() -> None:
    asked = create()
    asked.create.trace_id = "t" * 32
    asked.events[0].agent_started.ordinal = 99
    core.stamp(core.check(asked), seconds=5, nanos=7_000)
    stamped = asked.events[0]
    assert (stamped.event_time.seconds, stamped.event_time.nanos, stamped.append_id) == (5, 7_000, APPEND)
    assert (stamped.session_id, stamped.agent, stamped.trace_id) == ("talk", "lookup", "t" * 32)
    assert stamped.agent_started.ordinal == 0


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("key_reused", "IDEMPOTENCY_KEY_REUSED"),
        ("exists", "RUN_EXISTS"),
        ("busy", "SESSION_BUSY"),
        ("unknown", "RUN_NOT_FOUND"),
        ("ended", "RUN_ENDED"),
        ("illegal", "TRANSITION_ILLEGAL"),
        ("stale", "APPEND_STALE"),
    ],
)
def test_each_word_of_the_database_has_its_reason(reason: str, expected: str) -> None:
    error = refusals.refusal(core.check(create()), reason, run_id=RUN, state=core.COMPLETED)
    assert error.reason_name == expected
    assert error.message


def test_a_refused_value_names_the_run_and_the_detail() -> None:
    error = refusals.refused_value(core.check(create()), "22021 bad")
    assert (error.reason_name, error.metadata) == ("EVENT_REFUSED", {"run_id": RUN, "detail": "22021 bad"})
