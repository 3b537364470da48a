"""What a run does next, decided from its plan and its progress alone: the agent loop."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

import orjson
from mainspring.v1 import events_pb2, types_pb2
from mainspring_kit.errors import MainspringError, Reason

from mainspring_execution.core.intrinsic import HANDOFF_PREFIX, is_intrinsic
from mainspring_execution.core.plan import STEPS_MAX, AgentPlan
from mainspring_execution.core.progress import Progress
from mainspring_execution.core.record import error_value
from mainspring_execution.core.sub_runs import find_failure, handed_over_already
from mainspring_execution.core.unknown import Ask, WaitForAnswer, resolve_unknown
from mainspring_execution.core.waits import settle_wait, wait_of, wake_time

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
    """Make these calls, all at once; those with an intent in the log are made again under the same call_id.

    `until`: there is something else to do then, in seconds since 1970; infinite: there is not.
    """

    calls: tuple[events_pb2.PlannedCall, ...]
    until: float = math.inf


@dataclass(frozen=True, slots=True)
class OpenWaits:
    """Record that these calls wait."""

    calls: tuple[events_pb2.PlannedCall, ...]


@dataclass(frozen=True, slots=True)
class HandOver:
    """Let another agent go on: everything else of the step is done."""

    call: events_pb2.PlannedCall


@dataclass(frozen=True, slots=True)
class Close:
    """Record how a call ended that only waited, or of which a person had to say what became of it."""

    outcome: events_pb2.ToolCompleted


@dataclass(frozen=True, slots=True)
class Expire:
    """The time for an answer is over."""

    approval_id: str


@dataclass(frozen=True, slots=True)
class Park:
    """Nothing can be done before `until` (None: before somebody asks for something): give the run back."""

    until: float | None = None
    kind: types_pb2.WaitKind.ValueType = types_pb2.WAIT_KIND_UNSPECIFIED
    detail: str = ""
    call_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """End the run with this result: JSON."""

    result: bytes


@dataclass(frozen=True, slots=True)
class Fail:
    """End the run with this error."""

    error: types_pb2.RunError


Decision = Wait | CallModel | CallTools | OpenWaits | HandOver | Close | Expire | Ask | Park | Finish | Fail


def decide(plan: AgentPlan, progress: Progress, *, run_id: str, now: float, under_way: Container[str] = ()) -> Decision:
    """The next thing to do. `under_way`: the calls of which this process knows whether somebody makes them.

    `now`: in seconds since 1970.
    """
    if progress.ended:
        return Wait.ENDED
    if not progress.started:
        return Wait.BEGIN
    if progress.paused:
        return Park()
    if plan.fail_fast and (failure := find_failure(plan, progress)) is not None:
        return Fail(failure)
    calls = progress.open_calls()
    if calls:
        return _decide_calls(progress, calls, now=now, under_way=under_way)
    if progress.result:
        return Finish(progress.result)
    if progress.steps >= min(progress.agent_first_step - 1 + plan.steps_max, STEPS_MAX):
        return Fail(error_value(_steps_exhausted(run_id, plan)))
    due_time = progress.retry_times.get("", 0.0) if progress.retry_times else 0.0
    if due_time > now:
        return Park(due_time, types_pb2.WAIT_KIND_TIMER, f"the next attempt at model step {progress.steps + 1}")
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
    progress: Progress, calls: list[events_pb2.PlannedCall], *, now: float, under_way: Container[str]
) -> Decision:
    """What is asked of others goes on beside what only waits; the run is given back when nothing else is left."""
    waits = [call for call in calls if is_intrinsic(call.tool)]
    if waits:
        handoffs = [call for call in waits if call.tool.startswith(HANDOFF_PREFIX)]
        if len(handoffs) == len(calls):
            refused = handed_over_already(progress, handoffs[0])
            return HandOver(handoffs[0]) if refused is None else Close(refused)
        if handoffs:
            calls = [call for call in calls if call not in handoffs]
            waits = [call for call in waits if call not in handoffs]
    decision = _decide_waits(progress, waits, now=now) if waits else None
    if decision is not None:
        return decision
    callable_: list[events_pb2.PlannedCall] = []
    for call in calls:
        intent = progress.intents.get(call.call_id)
        if intent is None or call.call_id in under_way or may_repeat(intent.effect):
            if not is_intrinsic(call.tool):
                callable_.append(call)
            continue
        unknown = resolve_unknown(progress, intent)
        if isinstance(unknown, Ask):
            return unknown
        if isinstance(unknown, events_pb2.ToolCompleted):
            return Close(unknown)
        if not isinstance(unknown, WaitForAnswer):
            callable_.append(call)
    due_times = [wake_time(progress.intents[call.call_id]) for call in waits]
    if progress.retry_times:
        due_times += [time for call in callable_ if (time := progress.retry_times.get(call.call_id, 0.0)) > now]
        callable_ = [call for call in callable_ if progress.retry_times.get(call.call_id, 0.0) <= now]
    until = min(due_times, default=math.inf)
    if callable_:
        return CallTools(tuple(callable_), until)
    return _park(progress, calls, until=until)


def _decide_waits(
    progress: Progress, waits: Iterable[events_pb2.PlannedCall], *, now: float
) -> OpenWaits | Close | Expire | None:
    """What is to be done for calls that wait; None: nothing yet."""
    if unopened := tuple(call for call in waits if call.call_id not in progress.intents):
        return OpenWaits(unopened)
    for call in waits:
        intent = progress.intents[call.call_id]
        outcome = settle_wait(progress, intent, now=now)
        if outcome is not None:
            return Close(outcome)
        if call.call_id in progress.approvals and wake_time(intent) <= now:
            return Expire(progress.approvals[call.call_id].approval_id)
    return None


def _park(progress: Progress, calls: list[events_pb2.PlannedCall], *, until: float) -> Park:
    """Told is what the first of the calls waits for."""
    first = progress.intents[calls[0].call_id]
    wait = wait_of(first.tool)
    if wait is not None:
        kind, detail = wait.kind, wait.describe(first)
    elif first.call_id in progress.approvals:
        kind, detail = types_pb2.WAIT_KIND_APPROVAL, progress.approvals[first.call_id].title
    else:
        kind, detail = types_pb2.WAIT_KIND_TIMER, f"the next attempt at {first.tool}"
    return Park(until if until < math.inf else None, kind, detail, tuple(call.call_id for call in calls))


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
