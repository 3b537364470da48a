"""What fails in passing is tried again as the agent's policy says; each attempt is in the log, and time bounds all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
from mainspring.v1 import events_pb2, execution_pb2, state_pb2, types_pb2
from mainspring_execution.config import ExecutionSettings

from test_framework.agents import Spec, call, scripted_agent, step
from tests.contract.execution_platform import Caller, names, terminal
from tests.contract.test_execution_recovery import doomed, settings, start_on

__all__ = ["settings"]

pytestmark = pytest.mark.contract

grpc_service = "Execution"
grpc_databases = ("State", "Registry")

COMPLETED, FAILED = types_pb2.RUN_STATE_COMPLETED, types_pb2.RUN_STATE_FAILED
DONE = step("Done.", result={"status": "{{calls[0].status}}", "attempts": "{{calls[0].attempts}}"})
# Short waits, so that no test has to.
QUICK = {"backoff": {"initial": "10ms", "max": "20ms"}}
ERRORS = dict.fromkeys(("timeout", "unavailable", "exhausted", "internal"), QUICK)


def report(status: str, attempts: int) -> bytes:
    """The result of a run of `trying`: what became of its first call."""
    return orjson.dumps({"attempts": attempts, "status": status})


def trying(*calls: Spec, name: str = "trying", **more: Any) -> Spec:
    """An agent that makes these calls at once, whatever becomes of them."""
    return scripted_agent(name, step("I try.", *calls), DONE, **{"errors": ERRORS, **more})


def failures(events: Sequence[events_pb2.RunEvent]) -> list[events_pb2.AttemptFailed]:
    """The failed attempts that were repeated, in order."""
    found = [event for event in events if event.HasField("attempt_failed")]
    assert all(event.safe_to_skip for event in found)
    return [event.attempt_failed for event in found]


def outcome(events: Sequence[events_pb2.RunEvent]) -> events_pb2.ToolCompleted:
    """The outcome of the run's one call."""
    (found,) = [event.tool_completed for event in events if event.HasField("tool_completed")]
    return found


async def test_a_call_that_fails_in_passing_is_made_again_until_it_succeeds(ann: Caller) -> None:
    busy = call("diagnostics.fail", code="UNAVAILABLE", message="busy", times=2)
    await ann.register(trying(busy))
    run = await ann.run("trying")
    events = await ann.log(run.run_id)
    assert (run.state, run.result) == (COMPLETED, report("ok", 3))
    assert names(events)[2:6] == ["tool_executing", "attempt_failed", "attempt_failed", "tool_completed"]
    assert [(failed.call_id, failed.attempt, failed.step) for failed in failures(events)] == [
        (f"{run.run_id}.2.0", 1, 0),
        (f"{run.run_id}.2.0", 2, 0),
    ]
    assert {(failed.error.code, failed.error.message) for failed in failures(events)} == {("UNAVAILABLE", "busy")}
    for event in events[3:5]:
        # Two clocks, and a wait of 20 ms at most.
        late_ns = event.attempt_failed.retry_time.ToNanoseconds() - event.event_time.ToNanoseconds()
        assert abs(late_ns) < 2_000_000_000


@pytest.mark.parametrize(
    ("code", "attempts"),
    [
        ("DEADLINE_EXCEEDED", 3),
        ("UNAVAILABLE", 3),
        ("RESOURCE_EXHAUSTED", 3),
        ("INTERNAL", 2),
        ("INVALID_ARGUMENT", 1),
        ("PERMISSION_DENIED", 1),
        ("FAILED_PRECONDITION", 1),
    ],
)
async def test_a_class_of_errors_has_so_many_attempts(ann: Caller, code: str, attempts: int) -> None:
    await ann.register(trying(call("diagnostics.fail", code=code)))
    run = await ann.run("trying")
    events = await ann.log(run.run_id)
    assert run.state == COMPLETED
    assert [failed.attempt for failed in failures(events)] == list(range(1, attempts))
    assert (outcome(events).attempts, outcome(events).error.code) == (attempts, code)


async def test_a_specification_may_turn_attempts_off(ann: Caller) -> None:
    await ann.register(trying(call("diagnostics.fail", code="UNAVAILABLE"), errors={"unavailable": {"attempts": 1}}))
    run = await ann.run("trying")
    assert run.result == report("error", 1)


async def test_a_keyed_call_is_made_again_under_its_key_and_an_unsafe_one_is_not(ann: Caller, tmp_path: Path) -> None:
    arguments = {"folder": str(tmp_path), "times": 1}
    await ann.register(trying(call("probe.order", **arguments)))
    run = await ann.run("trying")
    assert run.result == report("ok", 2)
    notes = tmp_path / "attempts"
    assert notes.read_text() == f"{run.run_id}.2.0 1\n{run.run_id}.2.0 2\n"
    notes.unlink()
    await ann.register(trying(call("probe.ignite", **arguments), name="daring"))
    run = await ann.run("daring")
    assert run.result == report("error", 1)
    assert notes.read_text() == f"{run.run_id}.2.0 1\n"


async def test_an_error_keeps_all_that_the_tool_said_of_it(ann: Caller, tmp_path: Path) -> None:
    last = step("So.", result="{{calls[0].result}}")
    strict = scripted_agent("strict", step("I try.", call("probe.order", folder=str(tmp_path))), last, errors=ERRORS)
    await ann.register(strict)
    run = await ann.run("strict")
    events = await ann.log(run.run_id)
    assert (run.error.code, run.error.message) == ("UNAVAILABLE", "The line is busy: try again.")
    assert run.error.metadata["line"] == "7"
    for error in (outcome(events).error, failures(events)[0].error):
        assert (error.code, error.reason, error.metadata["line"]) == ("UNAVAILABLE", "LINE_BUSY", "7")
    assert terminal(events).error == run.error


async def test_other_calls_of_the_step_go_on_beside_one_that_is_tried_again(ann: Caller) -> None:
    busy = call("diagnostics.fail", code="UNAVAILABLE", times=2)
    await ann.register(trying(busy, call("diagnostics.sleep", seconds=0.3), call("diagnostics.echo", value=1)))
    run = await ann.run("trying")
    events = await ann.log(run.run_id)
    assert run.result == report("ok", 3)
    closed = [event.tool_completed for event in events if event.HasField("tool_completed")]
    assert sorted((done.tool, done.attempts) for done in closed) == [
        ("diagnostics.echo", 1),
        ("diagnostics.fail", 3),
        ("diagnostics.sleep", 1),
    ]
    assert all(done.duration_ms >= 300 for done in closed if done.tool == "diagnostics.sleep")


async def test_a_failed_attempt_at_a_model_step_is_in_the_log(ann: Caller) -> None:
    failing = step("At last.", result=1, fail={"code": "UNAVAILABLE", "message": "busy", "times": 2})
    await ann.register(scripted_agent("flaky", failing, errors=ERRORS))
    run = await ann.run("flaky")
    events = await ann.log(run.run_id)
    assert run.state == COMPLETED
    assert names(events) == ["agent_started", "attempt_failed", "attempt_failed", "agent_thinking", "agent_completed"]
    assert [(failed.step, failed.attempt, failed.call_id) for failed in failures(events)] == [(1, 1, ""), (1, 2, "")]
    assert failures(events)[0].error.reason == "MODEL_FAILED"


async def test_the_budget_of_a_run_bounds_all_its_attempts(ann: Caller) -> None:
    busy = [call("diagnostics.fail", code="UNAVAILABLE", message=name) for name in ("a", "b")]
    await ann.register(trying(*busy, errors={"unavailable": {"attempts": 50, **QUICK}}, limits={"retries": 3}))
    run = await ann.run("trying")
    events = await ann.log(run.run_id)
    assert len(failures(events)) == 3
    closed = [event.tool_completed.attempts for event in events if event.HasField("tool_completed")]
    assert sum(closed) == 5


async def test_a_model_that_takes_too_long_is_asked_again_and_then_fails_the_run(ann: Caller) -> None:
    slow = scripted_agent("slow", step("Slowly.", delay="60s", result=1), errors={"timeout": {"attempts": 2, **QUICK}})
    slow["model"]["timeout"] = "200ms"
    await ann.register(slow)
    run = await ann.run("slow")
    events = await ann.log(run.run_id)
    assert (run.state, run.error.code, run.error.reason) == (FAILED, "DEADLINE_EXCEEDED", "STEP_TIMED_OUT")
    assert run.error.metadata == {"step": "1", "timeout_seconds": "0.2"}
    assert names(events) == ["agent_started", "attempt_failed", "agent_failed"]


async def test_the_time_of_a_step_bounds_the_model_and_all_attempts_at_it(ann: Caller) -> None:
    limits = {"step_timeout": "500ms"}
    slow = scripted_agent("slow", step("Slowly.", delay="60s", result=1), errors={"timeout": QUICK}, limits=limits)
    slow["model"]["timeout"] = "400ms"
    await ann.register(slow)
    run = await ann.run("slow")
    events = await ann.log(run.run_id)
    assert run.error.metadata == {"step": "1", "timeout_seconds": "0.5"}
    assert names(events) == ["agent_started", "attempt_failed", "agent_failed"]


async def test_the_time_of_a_step_bounds_its_calls_and_the_next_step_has_its_own(ann: Caller) -> None:
    await ann.register(trying(call("diagnostics.sleep", seconds=60), limits={"step_timeout": "500ms"}))
    run = await ann.run("trying")
    events = await ann.log(run.run_id)
    assert run.result == report("timed_out", 1)
    assert (outcome(events).error.reason, outcome(events).status) == ("TOOL_TIMED_OUT", types_pb2.TOOL_STATUS_TIMED_OUT)


async def test_an_agent_may_give_a_tool_less_time_than_it_takes(ann: Caller) -> None:
    once = {"timeout": {"attempts": 2, **QUICK}}
    await ann.register(
        trying(call("diagnostics.sleep", seconds=60), errors=once, tool_timeouts={"diagnostics.sleep": "200ms"})
    )
    run = await ann.run("trying")
    events = await ann.log(run.run_id)
    assert run.result == report("timed_out", 2)
    assert [failed.error.metadata["timeout_seconds"] for failed in failures(events)] == ["0.2"]


async def test_nothing_is_tried_again_after_the_runs_deadline(ann: Caller) -> None:
    patient = call("diagnostics.fail", code="UNAVAILABLE", retry_after_seconds=60)
    await ann.register(trying(patient, limits={"timeout": "50s"}))
    run = await ann.run("trying")
    assert (run.state, run.result) == (COMPLETED, report("error", 1))


async def test_a_long_wait_gives_the_run_back_and_counts_on(ann: Caller) -> None:
    patient = call("diagnostics.fail", code="RESOURCE_EXHAUSTED", times=1, retry_after_seconds=2.5)
    await ann.register(trying(patient))
    started = await ann.start("trying")
    events = await ann.reached(started.run_id, "agent_waiting")
    failed_time = failures(events)[0].retry_time
    assert names(events)[-2:] == ["attempt_failed", "agent_waiting"]
    waiting = events[-1].agent_waiting
    assert (waiting.wait_for, waiting.until) == (types_pb2.WAIT_KIND_TIMER, failed_time)
    assert list(waiting.call_ids) == [f"{started.run_id}.2.0"]
    run = await ann.end_of(started.run_id)
    events = await ann.log(started.run_id)
    assert (run.result, run.epoch) == (report("ok", 2), 2)
    assert "run_recovered" not in names(events)
    completed = next(event for event in events if event.HasField("tool_completed"))
    assert completed.event_time.ToNanoseconds() >= failed_time.ToNanoseconds() - 200_000_000
    asked = state_pb2.ListRunMetricsRequest(run_id=run.run_id)
    (row,) = (await ann.state.ListRunMetrics(asked, **ann.options("operator"))).metrics
    assert (row.run_id, row.model_calls, row.tool_calls, row.tool_errors, row.retries) == (run.run_id, 2, 1, 0, 1)
    assert 2_000 < row.waiting_ms < row.duration_ms


async def test_a_takeover_counts_on_from_the_log(ann: Caller, settings: ExecutionSettings) -> None:
    failing = step("Never.", result=1, fail={"code": "UNAVAILABLE", "message": "busy"})
    errors = {"unavailable": {"attempts": 2, "backoff": {"initial": "2s", "max": "2s"}}}
    await ann.register(scripted_agent("flaky", failing, errors=errors))
    async with doomed(settings) as execution:
        run_id = await start_on(execution, ann, agent="flaky")
        await ann.reached(run_id, "attempt_failed")
    run = await ann.end_of(run_id)
    events = await ann.log(run_id)
    assert run.state == FAILED
    assert [failed.attempt for failed in failures(events)] == [1]


async def test_a_wait_for_the_next_attempt_ends_with_a_cancel(ann: Caller) -> None:
    failing = step("Never.", result=1, fail={"code": "UNAVAILABLE", "message": "busy"})
    errors = {"unavailable": {"attempts": 9, "backoff": {"initial": "1.9s", "max": "1.9s", "multiplier": 1}}}
    await ann.register(scripted_agent("flaky", failing, errors=errors))
    started = await ann.start("flaky")
    await ann.reached(started.run_id, "attempt_failed")
    await ann.execution.CancelRun(execution_pb2.CancelRunRequest(run_id=started.run_id), **ann.options())
    assert (await ann.end_of(started.run_id)).state == types_pb2.RUN_STATE_CANCELLED
