"""The times of run, step, model and tool nest: each call and attempt gets what is left of the narrowest."""

from __future__ import annotations

import math
import time

import pytest
from mainspring.v1 import types_pb2
from mainspring_execution.engine.deadlines import RUN_MARGIN_SECONDS, Deadlines, step_timed_out

from tests.unit.execution.samples import plan

pytestmark = pytest.mark.unit

HURRIED = plan(limits={"step_timeout": "10s"}, tool_timeouts={"diagnostics.echo": "5s"})


def deadlines(*, run_seconds: float | None = None) -> Deadlines:
    run = types_pb2.Run()
    if run_seconds is not None:
        run.deadline.FromNanoseconds(int((time.time() + run_seconds) * 1e9))
    return Deadlines(run)


def tool(seconds: int) -> types_pb2.Tool:
    declared = types_pb2.Tool()
    declared.timeout.FromSeconds(seconds)
    return declared


def bound(times: Deadlines, declared: types_pb2.Tool | None = None, *, name: str = "diagnostics.echo") -> float | None:
    found = times.bound_call(HURRIED, declared, name=name)
    return None if found is None else found.ToNanoseconds() / 1e9


def test_a_run_without_limits_bounds_nothing() -> None:
    times = deadlines()
    times.begin_step(plan(), 1)
    assert (times.nearest, times.bound_model(plan())) == (math.inf, math.inf)
    assert times.bound_call(plan(), None, name="diagnostics.echo") is None


def test_a_call_gets_the_least_of_all_times() -> None:
    assert bound(deadlines()) == 5
    assert bound(deadlines(), tool(3)) is None
    assert bound(deadlines(run_seconds=1)) == pytest.approx(1 + RUN_MARGIN_SECONDS, abs=0.5)
    times = deadlines(run_seconds=100)
    times.begin_step(HURRIED, 1)
    assert bound(times, tool(60), name="diagnostics.sleep") == pytest.approx(10, abs=0.5)
    assert bound(times, tool(60)) == 5


def test_a_call_whose_step_is_over_has_no_time_left() -> None:
    times = deadlines()
    times.begin_step(HURRIED, 1)
    times.step = time.time() - 1
    assert bound(times) == 0.001


def test_each_step_has_its_time_once() -> None:
    times = deadlines()
    times.begin_step(HURRIED, 1)
    first = times.step
    times.begin_step(HURRIED, 1)
    assert times.step == first
    times.begin_step(HURRIED, 2)
    assert times.step > first
    times.begin_step(plan(), 3)
    assert times.step == math.inf


def test_an_attempt_gets_the_models_time_or_what_is_left_of_the_step() -> None:
    quick = plan(limits={"step_timeout": "10s"}, model={"provider": "scripted", "timeout": "2s"})
    times = deadlines()
    times.begin_step(quick, 1)
    assert times.bound_model(quick) == 2
    times.step = time.time() + 1
    assert times.bound_model(quick) == pytest.approx(1, abs=0.5)
    assert step_timed_out(quick, times, step=1).metadata == {"step": "1", "timeout_seconds": "2"}
    times.step = time.time()
    error = step_timed_out(quick, times, step=1)
    assert (error.code.name, error.metadata) == ("DEADLINE_EXCEEDED", {"step": "1", "timeout_seconds": "10"})
