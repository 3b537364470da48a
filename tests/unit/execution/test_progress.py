"""What a log adds up to besides the next step: attempts and what they cost, and the row of metrics."""

from __future__ import annotations

from typing import Any

import pytest
from mainspring.v1 import events_pb2, types_pb2
from mainspring_execution.core.progress import Progress, fold
from mainspring_execution.core.record import make_call_id, make_metrics

from tests.unit.execution.samples import ENVELOPE, RUN_ID, started

pytestmark = pytest.mark.unit

CALL_ID = make_call_id(RUN_ID, 2, index=0)
USAGE = types_pb2.Usage(input_tokens=2, output_tokens=3)


# Any: the fields of events, by name.
def folded(*payloads: dict[str, Any]) -> Progress:
    return fold([started(), *(ENVELOPE.event(seq, **payload) for seq, payload in enumerate(payloads, 2))])


def thinking(step: int = 1, *, calls: int = 0, **more: Any) -> dict[str, Any]:
    planned = [
        events_pb2.PlannedCall(call_id=make_call_id(RUN_ID, 2, index=index), tool="diagnostics.echo")
        for index in range(calls)
    ]
    return {"agent_thinking": events_pb2.AgentThinking(step=step, planned_calls=planned, usage=USAGE), **more}


def executing() -> dict[str, Any]:
    return {"tool_executing": events_pb2.ToolExecuting(call_id=CALL_ID, tool="diagnostics.echo", attempt=1)}


def completed(status: types_pb2.ToolStatus.ValueType = types_pb2.TOOL_STATUS_OK, **more: Any) -> dict[str, Any]:
    return {"tool_completed": events_pb2.ToolCompleted(call_id=CALL_ID, status=status, **more)}


def failed(attempt: int, *, step: int = 0, call_id: str = "", retry_seconds: int = 1_000) -> dict[str, Any]:
    failure = events_pb2.AttemptFailed(step=step, call_id=call_id, attempt=attempt)
    failure.retry_time.FromSeconds(retry_seconds)
    return {"attempt_failed": failure, "safe_to_skip": True}


def at(seconds: int, payload: dict[str, Any]) -> dict[str, Any]:
    event = events_pb2.RunEvent()
    event.event_time.FromSeconds(seconds)
    return {**payload, "event_time": event.event_time}


def test_attempts_at_a_step_count_until_it_ends() -> None:
    progress = folded(failed(1, step=1), failed(2, step=1, retry_seconds=1_007))
    assert [failure.attempt for failure in progress.failures] == [1, 2]
    assert (progress.retries, progress.retry_times) == (2, {"": 1_007.0})
    progress = folded(failed(1, step=1), thinking())
    assert (progress.failures, progress.retries, progress.retry_times) == ([], 1, {})


def test_attempts_at_a_call_count_until_it_ends() -> None:
    begun = (thinking(calls=1), executing())
    progress = folded(*begun, failed(1, call_id=CALL_ID))
    assert (progress.attempts, progress.retry_times) == ({CALL_ID: 2}, {CALL_ID: 1_000.0})
    progress = folded(*begun, failed(1, call_id=CALL_ID), completed(attempts=2))
    assert (progress.retry_times, progress.retries) == ({}, 1)


def test_a_takeover_counts_what_may_have_been_another_attempt() -> None:
    recovered = {"run_recovered": events_pb2.RunRecovered(attempt=1, lost_calls=[CALL_ID])}
    progress = folded(thinking(calls=1), executing(), failed(1, call_id=CALL_ID), recovered)
    assert progress.attempts == {CALL_ID: 3}


def test_metrics_count_what_was_done() -> None:
    error = types_pb2.TOOL_STATUS_ERROR
    counted = make_metrics(folded(thinking(calls=1), executing(), failed(1, call_id=CALL_ID), completed(error)))
    assert (counted.model_calls, counted.tool_calls, counted.tool_errors, counted.retries) == (1, 1, 1, 1)
    counted = make_metrics(folded(thinking(calls=1), executing(), completed(cached=True)))
    assert (counted.tool_calls, counted.tool_errors, counted.cache_hits) == (1, 0, 1)
    denied = make_metrics(folded(thinking(calls=1), executing(), completed(types_pb2.TOOL_STATUS_DENIED)))
    assert (denied.tool_calls, denied.tool_errors) == (1, 0)


def test_what_was_taken_from_another_log_counts_there() -> None:
    copied = {"source_seq": 2}
    progress = folded(
        {**thinking(calls=1), **copied}, {**executing(), **copied}, {**completed(), **copied}, thinking(2)
    )
    counted = make_metrics(progress)
    assert (counted.model_calls, counted.tool_calls, progress.input_tokens) == (1, 0, 2)


def test_time_stands_still_from_the_wait_to_what_comes_after_it() -> None:
    waiting = {"agent_waiting": events_pb2.AgentWaiting()}
    paused = {"agent_paused": events_pb2.AgentPaused()}
    progress = folded(at(100, waiting), at(103, paused), at(110, {"agent_resumed": events_pb2.AgentResumed()}))
    assert (progress.waiting_ms, progress.waiting_since_ms) == (10_000, 0)
    progress = folded(at(100, waiting))
    progress.end_wait(104e3)
    assert progress.waiting_ms == 4_000
    progress.apply(ENVELOPE.event(3, **thinking()))
    assert progress.waiting_ms == 4_000
