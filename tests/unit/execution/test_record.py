"""What is written down: stages that are never empty, errors within bounds, no call left open."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mainspring.v1 import dispatcher_pb2, events_pb2, types_pb2
from mainspring_execution.core.progress import fold
from mainspring_execution.core.record import (
    CORE_EXECUTION,
    MESSAGE_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
    STAGES,
    close_calls,
    cut,
    error_value,
    make_outcome,
    measure_stages,
    to_ms,
)
from mainspring_execution.core.thought import Thought, WantedCall, record_thought
from mainspring_kit.errors import MainspringError, Reason

from tests.unit.execution.samples import ENVELOPE, RUN_ID, started

pytestmark = pytest.mark.unit


@given(st.lists(st.floats(0, 100), min_size=6, max_size=6))
def test_five_stages_in_order_none_of_zero_length(times: list[float]) -> None:
    moments = sorted(times)
    stages = measure_stages(dict(zip(STAGES, moments, strict=False)), end=moments[5])
    assert [stage.name for stage in stages] == list(STAGES)
    assert all(stage.duration_ms >= 0.001 for stage in stages)
    assert sum(stage.duration_ms for stage in stages) >= (moments[5] - moments[0]) * 1e3 - 0.001


def test_a_run_that_ends_early_has_the_stages_it_went_through() -> None:
    assert [stage.name for stage in measure_stages({STAGES[0]: 1.0, STAGES[1]: 2.0}, end=2.5)] == list(STAGES[:2])


def test_time_under_earlier_executors_counts_to_the_core() -> None:
    marks = dict(zip(STAGES, [0.0, 1.0, 2.0, 3.0, 4.0], strict=True))
    durations = {stage.name: stage.duration_ms for stage in measure_stages(marks, end=5.0, carried_seconds=10.0)}
    assert durations[CORE_EXECUTION] == 11_000
    assert sum(durations.values()) == 15_000


@pytest.mark.parametrize(("seconds", "milliseconds"), [(0.0, 0.001), (1e-9, 0.001), (0.0015, 1.5), (0.0000021, 0.003)])
def test_milliseconds_are_rounded_up_to_the_microsecond(seconds: float, milliseconds: float) -> None:
    assert to_ms(seconds) == milliseconds


@given(st.text(max_size=5_000))
def test_messages_are_cut_to_their_bound(text: str) -> None:
    assert len(cut(text).encode(errors="surrogatepass")) <= MESSAGE_BYTES_MAX
    assert text.startswith(cut(text))


def test_an_error_keeps_code_reason_and_metadata() -> None:
    value = error_value(MainspringError(Reason.TOOL_NOT_FOUND, "no such tool", tool="x"))
    assert (value.code, value.reason, dict(value.metadata)) == ("NOT_FOUND", "TOOL_NOT_FOUND", {"tool": "x"})


def test_open_calls_are_closed_with_the_error_and_their_own_names() -> None:
    log = [started()]
    calls = [events_pb2.PlannedCall(call_id=f"c{index}", tool="t") for index in range(3)]
    log.append(ENVELOPE.event(2, agent_thinking=events_pb2.AgentThinking(step=1, planned_calls=calls)))
    for index in range(2):
        intent = events_pb2.ToolExecuting(call_id=f"c{index}", tool="t", attempt=1)
        log.append(ENVELOPE.event(3 + index, tool_executing=intent))
    log.append(ENVELOPE.event(5, tool_completed=events_pb2.ToolCompleted(call_id="c0")))
    error = error_value(MainspringError(Reason.TOOL_CANCELLED, "stopped"))
    closed = close_calls(fold(log), error, status=types_pb2.TOOL_STATUS_CANCELLED)
    assert [(outcome.call_id, outcome.error.metadata["call_id"], outcome.attempts) for outcome in closed] == [
        ("c1", "c1", 1)
    ]


def test_an_outcome_no_event_could_hold_becomes_an_error() -> None:
    intent = events_pb2.ToolExecuting(call_id="c", tool="t")
    result = dispatcher_pb2.ToolResult(status=types_pb2.TOOL_STATUS_OK, result=b"1" * (PAYLOAD_BYTES_MAX + 1))
    outcome = make_outcome(intent, result, duration_ms=1.0)
    assert (outcome.status, outcome.error.reason, outcome.result) == (
        types_pb2.TOOL_STATUS_ERROR,
        "PAYLOAD_TOO_LARGE",
        b"",
    )


def test_an_outcome_keeps_the_tools_own_error_and_no_result() -> None:
    intent = events_pb2.ToolExecuting(call_id="c", tool="t")
    error = types_pb2.RunError(code="NOT_FOUND", reason="NO_SUCH_LINE", message="line 3")
    result = dispatcher_pb2.ToolResult(status=types_pb2.TOOL_STATUS_ERROR, error=error, result=b"1", attempts=2)
    outcome = make_outcome(intent, result, duration_ms=1.0)
    assert (outcome.error, outcome.result, outcome.attempts) == (error, b"", 2)


def test_a_thought_is_bounded() -> None:
    usage = types_pb2.Usage()
    many = Thought("m", "", usage, calls=tuple(WantedCall("t", b"{}") for _ in range(33)))
    for thought, reason in (
        (many, "QUEUE_FULL"),
        (Thought("m", "ä" * (600 << 10), usage), "PAYLOAD_TOO_LARGE"),
        (Thought("m", "", usage, calls=(WantedCall("t", b"1" * ((1 << 20) + 1)),)), "PAYLOAD_TOO_LARGE"),
        (Thought("m", "", usage, result=b"1" * (16 << 20)), "PAYLOAD_TOO_LARGE"),
    ):
        with pytest.raises(MainspringError) as raised:
            record_thought(thought, run_id=RUN_ID, seq=2, step=1)
        assert raised.value.reason_name == reason
