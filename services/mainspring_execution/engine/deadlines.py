"""Until when one run, and the step that it is at, may go on: what each wait and call of it is bounded by."""

from __future__ import annotations

import math
import time
from typing import Final

from google.protobuf import duration_pb2
from mainspring.v1 import types_pb2
from mainspring_kit.errors import MainspringError, Reason

from mainspring_execution.core.plan import AgentPlan

# A run's end stops its calls by itself, and says so; the call's own end is for the case that nobody is left to do it.
RUN_MARGIN_SECONDS: Final = 2.0
# Of a tool that does not say how long it may take.
TOOL_SECONDS_DEFAULT: Final = 30.0
# How far the loop's clock may be before that of the day.
CLOCK_SECONDS: Final = 0.002


class Deadlines:
    """In seconds since 1970; infinite: none. A step's time counts while this process works on it."""

    __slots__ = ("_step", "run", "step")

    def __init__(self, run: types_pb2.Run) -> None:
        self.run = run.deadline.ToNanoseconds() / 1e9 if run.HasField("deadline") else math.inf
        self.step = math.inf
        self._step = 0

    @property
    def nearest(self) -> float:
        """That of the step or of the run."""
        return min(self.step, self.run)

    def begin_step(self, plan: AgentPlan, step: int) -> None:
        """The time of a step begins, unless it has."""
        if step != self._step:
            self._step = step
            seconds = plan.step_timeout_seconds
            self.step = time.time() + seconds if seconds < math.inf else math.inf

    def bound_model(self, plan: AgentPlan) -> float:
        """How many seconds an attempt at a model step may take; infinite: as long as the run."""
        if self.step == math.inf:
            return plan.model_timeout_seconds
        return max(0.0, min(plan.model_timeout_seconds, self.step - time.time()))

    def bound_call(self, plan: AgentPlan, tool: types_pb2.Tool | None, *, name: str) -> duration_pb2.Duration | None:
        """How long a call may take, where that is less than its tool says."""
        own_seconds = TOOL_SECONDS_DEFAULT
        if tool is not None and tool.HasField("timeout"):
            own_seconds = tool.timeout.ToNanoseconds() / 1e9
        seconds = min(plan.tool_timeouts.get(name, math.inf), self._left_for_calls())
        if seconds >= own_seconds:
            return None
        timeout = duration_pb2.Duration()
        timeout.FromNanoseconds(int(max(seconds, 0.001) * 1e9))
        return timeout

    def _left_for_calls(self) -> float:
        return min(self.step, self.run + RUN_MARGIN_SECONDS) - time.time()


def step_timed_out(plan: AgentPlan, deadlines: Deadlines, *, step: int) -> MainspringError:
    """STEP_TIMED_OUT: the time of the step is over, or that of this attempt at it."""
    is_over = deadlines.step - time.time() < CLOCK_SECONDS
    seconds = plan.step_timeout_seconds if is_over else plan.model_timeout_seconds
    what = f"Model step {step} did not end" if is_over else f"The model did not answer step {step}"
    limit = "limits.step_timeout" if is_over else "model.timeout"
    return MainspringError(
        Reason.STEP_TIMED_OUT,
        f"{what} within {seconds:.6g} s: raise {limit}, or ask for less.",
        step=step,
        timeout_seconds=f"{seconds:.6g}",
    )
