"""Calls that only wait, and that execution serves itself: what they ask for, when they are over, and how they end.

The clock is the caller's: `now` is in seconds since 1970. A call's intent in the log is all that is known of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Protocol

import orjson
from mainspring.v1 import events_pb2, types_pb2
from mainspring_kit.errors import MainspringError, Reason

from mainspring_execution.core.intrinsic import AGENT_PREFIX, APPROVE, ASK, SCHEMAS, SIGNAL, SLEEP
from mainspring_execution.core.plan import parse_seconds
from mainspring_execution.core.progress import Progress
from mainspring_execution.core.record import error_value, to_ms
from mainspring_execution.core.schema import Schema, TooCostlyError, schema_fault

SECONDS_MAX: Final = 366 * 86_400.0
SCHEMA_BYTES_MAX: Final = 16 << 10
CHECK_STEPS_MAX: Final = 2_000
# Of the input of another agent, which is its own affair.
_ANYTHING: Final = Schema({})

OK: Final = types_pb2.TOOL_STATUS_OK
TIMED_OUT: Final = types_pb2.TOOL_STATUS_TIMED_OUT
DENIED: Final = types_pb2.TOOL_STATUS_DENIED


@dataclass(frozen=True, slots=True)
class Opening:
    """How a wait begins. `wake_time`: when it is over by itself. `question`: what a person is asked, without its id."""

    wake_time: float | None = None
    question: events_pb2.ApprovalRequested | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """How a wait ended: a result (Any: a JSON value), or an error."""

    status: types_pb2.ToolStatus.ValueType
    result: Any = None
    error: types_pb2.RunError | None = None


class Wait(Protocol):
    """One kind of call that waits. `arguments` have the form of its schema: JSON values, Any."""

    kind: types_pb2.WaitKind.ValueType

    def open(self, call: events_pb2.PlannedCall, arguments: Mapping[str, Any], *, now: float) -> Opening:
        """What the call asks for; TOOL_ARGUMENTS_INVALID."""
        ...

    def settle(self, progress: Progress, intent: events_pb2.ToolExecuting, *, now: float) -> Ended | None:
        """How the wait has ended; None: it has not."""
        ...

    def describe(self, intent: events_pb2.ToolExecuting) -> str:
        """What it waits for, for people."""
        ...


def wait_of(tool: str) -> Wait | None:
    """The kind of wait that a tool is; None: there is no such tool."""
    return _SUB_RUN if tool.startswith(AGENT_PREFIX) else _WAITS.get(tool)


def open_wait(
    call: events_pb2.PlannedCall, *, now: float
) -> tuple[events_pb2.ToolExecuting, events_pb2.ApprovalRequested | None]:
    """The intent of a call, and what a person is asked, without its id. TOOL_NOT_FOUND, TOOL_ARGUMENTS_INVALID."""
    wait = wait_of(call.tool)
    if wait is None:
        raise MainspringError(Reason.TOOL_NOT_FOUND, f"There is no tool {call.tool}: check the name.", tool=call.tool)
    opening = wait.open(call, read_arguments(call), now=now)
    intent = make_intent(call)
    if opening.wake_time is not None:
        intent.wake_time.FromMicroseconds(math.ceil(opening.wake_time * 1e6))
    if opening.question is not None:
        opening.question.call_id = call.call_id
        if opening.wake_time is not None:
            opening.question.expires_time.CopyFrom(intent.wake_time)
    return intent, opening.question


def make_intent(call: events_pb2.PlannedCall) -> events_pb2.ToolExecuting:
    """The intent of a call that waits for nothing yet."""
    return events_pb2.ToolExecuting(
        call_id=call.call_id,
        tool=call.tool,
        arguments=call.arguments,
        effect=types_pb2.EFFECT_CLASS_PURE,
        attempt=1,
    )


def settle_wait(progress: Progress, intent: events_pb2.ToolExecuting, *, now: float) -> events_pb2.ToolCompleted | None:
    """The outcome of an open call; None: it goes on waiting."""
    wait = wait_of(intent.tool)
    ended = None if wait is None else wait.settle(progress, intent, now=now)
    if ended is None:
        return None
    return close(progress, intent, ended=ended, now=now)


def close(
    progress: Progress, intent: events_pb2.ToolExecuting, *, ended: Ended, now: float
) -> events_pb2.ToolCompleted:
    """The outcome of a call that ended so."""
    opened_ms = progress.opened_ms.get(intent.call_id) or now * 1e3
    outcome = events_pb2.ToolCompleted(
        call_id=intent.call_id,
        tool=intent.tool,
        status=ended.status,
        duration_ms=to_ms(now - opened_ms / 1e3),
        attempts=1,
    )
    if ended.error is None:
        outcome.result = orjson.dumps(ended.result)
    else:
        outcome.error.CopyFrom(ended.error)
    return outcome


def wake_time(intent: events_pb2.ToolExecuting) -> float:
    """When the wait is over by itself; infinite: never."""
    return intent.wake_time.ToNanoseconds() / 1e9 if intent.HasField("wake_time") else math.inf


class _Sleep:
    kind = types_pb2.WAIT_KIND_TIMER

    def open(self, call: events_pb2.PlannedCall, arguments: Mapping[str, Any], *, now: float) -> Opening:
        if len(arguments) != 1:
            raise arguments_invalid(call, "$", fault="give either seconds or until")
        if "seconds" in arguments:
            return Opening(now + _read_duration(call, arguments, name="seconds"))
        return Opening(_read_moment(call, arguments["until"], now=now))

    def settle(self, progress: Progress, intent: events_pb2.ToolExecuting, *, now: float) -> Ended | None:
        if now < wake_time(intent):
            return None
        opened_ms = progress.opened_ms.get(intent.call_id) or now * 1e3
        return Ended(OK, {"slept_seconds": round(max(0.0, now - opened_ms / 1e3), 3)})

    def describe(self, intent: events_pb2.ToolExecuting) -> str:
        return "a sleep"


class _Signal:
    kind = types_pb2.WAIT_KIND_SIGNAL

    def open(self, call: events_pb2.PlannedCall, arguments: Mapping[str, Any], *, now: float) -> Opening:
        return Opening(now + _read_duration(call, arguments, name="timeout") if "timeout" in arguments else None)

    def settle(self, progress: Progress, intent: events_pb2.ToolExecuting, *, now: float) -> Ended | None:
        name = orjson.loads(intent.arguments)["name"]
        for signal in progress.signals:
            if signal.name == name:
                return Ended(OK, {"name": name, "data": _embed(signal.data), "by": signal.by})
        if now < wake_time(intent):
            return None
        seconds = wake_time(intent) - progress.opened_ms.get(intent.call_id, 0.0) / 1e3
        error = MainspringError(
            Reason.TOOL_TIMED_OUT,
            f"No signal {name} came within {seconds:.6g} s: send it sooner, or wait longer.",
            tool=intent.tool,
            timeout_seconds=f"{seconds:.6g}",
        )
        return Ended(TIMED_OUT, error=error_value(error))

    def describe(self, intent: events_pb2.ToolExecuting) -> str:
        return f"the signal {orjson.loads(intent.arguments)['name']}"


class _Question:
    """Asks a person. `title_field`: of its arguments; `shows_decision`: the result says that it was allowed."""

    kind = types_pb2.WAIT_KIND_APPROVAL

    def __init__(self, title_field: str, *, shows_decision: bool) -> None:
        self._title_field = title_field
        self._shows_decision = shows_decision

    def open(self, call: events_pb2.PlannedCall, arguments: Mapping[str, Any], *, now: float) -> Opening:
        schema = arguments.get("answer_schema")
        question = events_pb2.ApprovalRequested(
            title=arguments[self._title_field],
            arguments=canonical(arguments["arguments"]) if "arguments" in arguments else b"",
            answer_schema=_check_schema(call, schema) if schema else b"",
            role=arguments.get("role", "runner"),
            kind=types_pb2.APPROVAL_KIND_QUESTION,
        )
        return Opening(
            now + _read_duration(call, arguments, name="expires") if "expires" in arguments else None, question
        )

    def settle(self, progress: Progress, intent: events_pb2.ToolExecuting, *, now: float) -> Ended | None:
        answer = progress.answers.get(intent.call_id)
        if answer is None:
            return None
        if answer.decision != types_pb2.APPROVAL_DECISION_ALLOW:
            return Ended(DENIED, error=denial(answer))
        decision = {"decision": "allow"} if self._shows_decision else {}
        return Ended(OK, {**decision, "data": _embed(answer.data), "by": answer.by})

    def describe(self, intent: events_pb2.ToolExecuting) -> str:
        return f"an answer to: {orjson.loads(intent.arguments)[self._title_field]}"


class _SubRun:
    """Waits for the end of another run, which comes as an input: nothing that the log alone tells."""

    kind = types_pb2.WAIT_KIND_RUN

    def open(self, call: events_pb2.PlannedCall, arguments: Mapping[str, Any], *, now: float) -> Opening:
        return Opening()

    def settle(self, progress: Progress, intent: events_pb2.ToolExecuting, *, now: float) -> Ended | None:
        return None

    def describe(self, intent: events_pb2.ToolExecuting) -> str:
        return f"the sub-run {intent.sub_run_id} of agent {intent.tool.removeprefix(AGENT_PREFIX)}"


_SUB_RUN: Final = _SubRun()
_WAITS: Final[dict[str, Wait]] = {
    SLEEP: _Sleep(),
    SIGNAL: _Signal(),
    APPROVE: _Question("title", shows_decision=True),
    ASK: _Question("question", shows_decision=False),
}


def denial(answer: events_pb2.ApprovalResolved) -> types_pb2.RunError:
    """What the model sees of an approval that was not given."""
    if answer.decision == types_pb2.APPROVAL_DECISION_EXPIRED:
        reason, message = "APPROVAL_EXPIRED", "Nobody answered in time, which counts as no."
    else:
        reason, message = "APPROVAL_DENIED", f"{answer.by} refused. Do without it, or ask for something else."
    metadata = {"approval_id": answer.approval_id, "by": answer.by}
    if answer.data:
        metadata["data"] = answer.data.decode(errors="replace")[:SCHEMA_BYTES_MAX]
    return types_pb2.RunError(code="PERMISSION_DENIED", reason=reason, message=message, metadata=metadata)


def arguments_invalid(call: events_pb2.PlannedCall, path: str, *, fault: str) -> MainspringError:
    """TOOL_ARGUMENTS_INVALID, as the model sees it."""
    return MainspringError(
        Reason.TOOL_ARGUMENTS_INVALID,
        f"The arguments of {call.tool} are not valid at {path}: {fault[:500]}. Call it again with right ones.",
        tool=call.tool,
        path=path,
    )


def canonical(value: Any) -> bytes:
    """A JSON value (Any) in the one form that people and hashes compare."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def _embed(data: bytes) -> Any:
    """A JSON value of somebody's, as it came (Any: for orjson); empty: null."""
    return orjson.Fragment(data) if data else None


def read_arguments(call: events_pb2.PlannedCall) -> Mapping[str, Any]:
    """The arguments of a call, as its schema says; JSON values: Any. TOOL_ARGUMENTS_INVALID."""
    try:
        arguments = orjson.loads(call.arguments or b"{}")
        fault = SCHEMAS.get(call.tool, _ANYTHING).first_fault(arguments, steps_max=CHECK_STEPS_MAX)
    except orjson.JSONDecodeError as error:
        raise arguments_invalid(call, "$", fault=f"they are not JSON: {error}") from error
    except TooCostlyError as error:
        raise arguments_invalid(call, "$", fault="they are too large") from error
    if fault is not None:
        raise arguments_invalid(call, fault.path, fault=fault.message)
    if not isinstance(arguments, dict):
        raise arguments_invalid(call, "$", fault="they are not an object")
    return arguments


def _read_duration(call: events_pb2.PlannedCall, arguments: Mapping[str, Any], *, name: str) -> float:
    seconds = parse_seconds(arguments[name])
    if seconds is None:
        raise arguments_invalid(
            call, f"$.{name}", fault=f"{arguments[name]!r} is not a duration such as 100ms, 30s or 5m"
        )
    if seconds > SECONDS_MAX:
        raise arguments_invalid(call, f"$.{name}", fault=f"{seconds:.6g} s are more than {SECONDS_MAX:.6g} s, a year")
    return seconds


def _read_moment(call: events_pb2.PlannedCall, text: str, *, now: float) -> float:
    try:
        moment = datetime.fromisoformat(text)
        seconds = moment.timestamp()
    except (ValueError, OverflowError) as error:
        raise arguments_invalid(
            call, "$.until", fault=f"{text[:100]!r} is not RFC 3339, as in 2026-11-24T03:06:12Z"
        ) from error
    if moment.tzinfo is None:
        raise arguments_invalid(call, "$.until", fault="it names no time zone, such as Z or +02:00")
    if seconds > now + SECONDS_MAX:
        raise arguments_invalid(call, "$.until", fault="it is more than a year from now")
    return seconds


def _check_schema(call: events_pb2.PlannedCall, schema: Mapping[str, Any]) -> bytes:
    text = canonical(schema)
    fault = f"it has more than {SCHEMA_BYTES_MAX} bytes" if len(text) > SCHEMA_BYTES_MAX else schema_fault(schema)
    if fault:
        raise arguments_invalid(call, "$.answer_schema", fault=fault)
    return text
