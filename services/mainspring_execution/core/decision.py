"""What a run does next, decided from its plan and its progress alone: the agent loop."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from enum import Enum
from typing import Final

import orjson
from mainspring.v1 import events_pb2, types_pb2
from mainspring_kit.errors import MainspringError, Reason

from mainspring_execution.core.plan import AgentPlan
from mainspring_execution.core.progress import Progress
from mainspring_execution.core.record import error_value

TAKEOVERS_WITHOUT_EVENT_MAX: Final = 3


class Wait(Enum):
    """Decisions that carry nothing."""

    BEGIN = "record agent_started"
    ENDED = "the run has its terminal event"


@dataclass(frozen=True, slots=True)
class CallModel:
    """Ask the model for this step."""

    step: int


@dataclass(frozen=True, slots=True)
class CallTools:
    """Make these calls, all at once; those with an intent in the log are made again under the same call_id."""

    calls: tuple[events_pb2.PlannedCall, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """End the run with this result: JSON."""

    result: bytes


@dataclass(frozen=True, slots=True)
class Fail:
    """End the run with this error."""

    error: types_pb2.RunError


Decision = Wait | CallModel | CallTools | Finish | Fail


def decide(plan: AgentPlan, progress: Progress, *, run_id: str, under_way: Container[str] = ()) -> Decision:
    """The next thing to do. `under_way`: the calls that this process has made and that have not answered."""
    if progress.ended:
        return Wait.ENDED
    if not progress.started:
        return Wait.BEGIN
    calls = progress.open_calls()
    if calls:
        return _decide_calls(progress, calls, under_way=under_way)
    if progress.result:
        return Finish(progress.result)
    if progress.steps >= plan.steps_max:
        return Fail(error_value(_steps_exhausted(run_id, plan)))
    return CallModel(progress.steps + 1)


def check_takeover(progress: Progress, *, run_id: str) -> MainspringError | None:
    """RUN_POISONED when this takeover is the third in a row that finds no new event."""
    attempts = progress.recoveries_in_a_row + 1
    if attempts < TAKEOVERS_WITHOUT_EVENT_MAX:
        return None
    return MainspringError(
        Reason.RUN_POISONED,
        f"{attempts} executors in turn died on run {run_id} without a new event: look at what its next step does to "
        "its process before it is started again.",
        run_id=run_id,
        attempts=attempts,
    )


def check_result(plan: AgentPlan, result: bytes, *, steps_max: int) -> MainspringError | None:
    """RESULT_INVALID when the result does not match the agent's output_schema; TooCostlyError after so many steps."""
    if plan.output_schema is None:
        return None
    fault = plan.output_schema.first_fault(orjson.loads(result), steps_max=steps_max)
    if fault is None:
        return None
    return MainspringError(
        Reason.RESULT_INVALID,
        f"The result of agent {plan.agent} version {plan.version} does not match its output_schema at "
        f"{fault.path}: {fault.message[:500]}. Register a version whose result or schema is right.",
        path=fault.path,
    )


def result_unchecked(plan: AgentPlan) -> MainspringError:
    """RESULT_INVALID for a result that could not be checked within the bounds."""
    return MainspringError(
        Reason.RESULT_INVALID,
        f"The result of agent {plan.agent} version {plan.version} takes too many steps to check against its "
        "output_schema, or nests too deep. Register a version whose schema or result is simpler.",
        path="$",
    )


def _decide_calls(
    progress: Progress, calls: list[events_pb2.PlannedCall], *, under_way: Container[str]
) -> CallTools | Fail:
    for call in calls:
        intent = progress.intents.get(call.call_id)
        if intent is not None and call.call_id not in under_way and not may_repeat(intent.effect):
            return Fail(error_value(_outcome_unknown(intent)))
    return CallTools(tuple(calls))


def may_repeat(effect: types_pb2.EffectClass.ValueType) -> bool:
    """Whether a call that may have been made can be made again under its call_id."""
    return effect in (
        types_pb2.EFFECT_CLASS_PURE,
        types_pb2.EFFECT_CLASS_IDEMPOTENT,
        types_pb2.EFFECT_CLASS_KEYED,
    )


def needs_durable_intent(effect: types_pb2.EffectClass.ValueType) -> bool:
    """Whether the intent must be durable before the call is made."""
    return effect not in (types_pb2.EFFECT_CLASS_PURE, types_pb2.EFFECT_CLASS_IDEMPOTENT)


def refuse_call(plan: AgentPlan, call: events_pb2.PlannedCall) -> MainspringError | None:
    """TOOL_NOT_FOUND for a call of a tool that the agent was not given, whatever its model asks for."""
    if call.tool in plan.tools:
        return None
    return MainspringError(
        Reason.TOOL_NOT_FOUND,
        f"Agent {plan.agent} has no tool {call.tool}: add it to the tools of its specification.",
        tool=call.tool,
    )


def _steps_exhausted(run_id: str, plan: AgentPlan) -> MainspringError:
    return MainspringError(
        Reason.STEPS_EXHAUSTED,
        f"Run {run_id} used all {plan.steps_max} model steps that agent {plan.agent} allows without a result: "
        "raise limits.max_steps, or make the agent end sooner.",
        run_id=run_id,
        max_steps=plan.steps_max,
    )


def _outcome_unknown(intent: events_pb2.ToolExecuting) -> MainspringError:
    return MainspringError(
        Reason.WORKER_LOST,
        f"The run was taken over while the unsafe tool {intent.tool} was under way (call {intent.call_id}): what the "
        "call did is not known and it is not made again. Look at its effect, then start the run again.",
        tool=intent.tool,
        call_id=intent.call_id,
    )
