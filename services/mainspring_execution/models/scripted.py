"""The scripted provider: answers the agent's model step n with entry n of its script. Calls nothing, costs nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import grpc
import orjson
from mainspring.v1 import events_pb2, types_pb2
from mainspring_kit.errors import RULES, MainspringError, Reason

from mainspring_execution.core.plan import AgentPlan, read_seconds, spec_invalid
from mainspring_execution.core.thought import Thought, Turn, WantedCall
from mainspring_execution.models.templates import (
    Bounded,
    Expression,
    Scope,
    Template,
    compile_template,
    template_invalid,
    walk,
)

MODEL_NAME: Final = "scripted/script"
DELAY_SECONDS_MAX: Final = 3_600.0

_ENTRY_FIELDS: Final = frozenset({"text", "calls", "result", "delay", "deltas", "fail"})


@dataclass(frozen=True, slots=True)
class _Failure:
    """How an entry fails. `times` None: at every attempt."""

    code: grpc.StatusCode
    message: Template
    times: int | None


@dataclass(frozen=True, slots=True)
class _Entry:
    """One compiled entry of a script."""

    text: Template
    calls: tuple[tuple[str, Template], ...]
    result: Template | None
    delay_seconds: float
    # In how many pieces the text is given out; 0: not before it is whole.
    deltas: int
    failure: _Failure | None

    def templates(self) -> list[Template]:
        """All templates of the entry."""
        found = [self.text, *(arguments for _, arguments in self.calls)]
        if self.result is not None:
            found.append(self.result)
        if self.failure is not None:
            found.append(self.failure.message)
        return found


class ScriptedModel:
    """The Model of an agent with `provider: scripted`."""

    needs_tools = False
    fallbacks = 0
    repairs = 0

    def __init__(self, plan: AgentPlan) -> None:
        script = plan.model.get("script") or []
        self._entries = [_compile_entry(entry, f"model.script[{index}]") for index, entry in enumerate(script)]
        self._instructions_words = len(plan.instructions.split())
        self._needs_history = any(
            expression.root == "history" or (expression.root == "session" and "id" not in expression.path[:1])
            for entry in self._entries
            for template in entry.templates()
            for expression in template.expressions
        )

    def rank(self, name: str) -> int:
        """There is one script."""
        return 0

    @property
    def needs_history(self) -> bool:
        """Whether an expression names `history` or `session.history`."""
        return self._needs_history

    def waits(self, step: int) -> bool:
        """Whether the entry of this step has a delay."""
        return step <= len(self._entries) and self._entries[step - 1].delay_seconds > 0

    async def think(self, turn: Turn, emit: Callable[[str], None]) -> Thought:
        """Answers with the entry of this step; MODEL_FAILED when the script has none or says so."""
        place = turn.step - turn.first_step
        if place >= len(self._entries):
            raise MainspringError(
                Reason.MODEL_FAILED,
                f"The script has {len(self._entries)} entries and none of them ended the run with a result: model step "
                f"{turn.step} has no answer. Give the script's last entry a result.",
                code=grpc.StatusCode.FAILED_PRECONDITION,
                provider="scripted",
                step=turn.step,
            )
        entry = self._entries[place]
        scope = Bounded(_TurnScope(turn))
        if entry.deltas:
            await _speak(entry.text.render_text(scope), emit, entry=entry)
        elif entry.delay_seconds:
            await asyncio.sleep(entry.delay_seconds)
        if entry.failure is not None and (entry.failure.times is None or turn.attempt <= entry.failure.times):
            raise MainspringError(
                Reason.MODEL_FAILED,
                entry.failure.message.render_text(scope),
                code=entry.failure.code,
                provider="scripted",
                step=turn.step,
            )
        text = entry.text.render_text(scope)
        calls = tuple(WantedCall(tool, _render_arguments(arguments, scope)) for tool, arguments in entry.calls)
        result = entry.result.render_json(scope) if entry.result is not None else b""
        usage = types_pb2.Usage(
            input_tokens=self._instructions_words + _count_words(turn),
            output_tokens=len(text.split()) + sum(len(call.arguments.split()) for call in calls) + len(result.split()),
        )
        return Thought(MODEL_NAME, text, usage, calls, result)


async def _speak(text: str, emit: Callable[[str], None], *, entry: _Entry) -> None:
    """Gives the text out in as many pieces as the entry says, its delay spread between them."""
    pieces = min(entry.deltas, len(text))
    for index in range(pieces):
        if entry.delay_seconds:
            await asyncio.sleep(entry.delay_seconds / pieces)
        emit(text[len(text) * index // pieces : len(text) * (index + 1) // pieces])
    if not pieces:
        await asyncio.sleep(entry.delay_seconds)


class _TurnScope:
    """The names that a script's expressions know, parsed only where one asks."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._parsed: dict[str, Any] = {}

    def _parse(self, name: str, data: bytes) -> Any:
        """The JSON value, parsed once however many expressions look into it: Any."""
        if name not in self._parsed:
            self._parsed[name] = orjson.loads(data)
        return self._parsed[name]

    def look_up(self, expression: Expression) -> Any:
        """The value of an expression; a JSON value: Any."""
        turn, root, path = self._turn, expression.root, expression.path
        if root == "calls":
            return self._look_up_call(expression)
        if root == "input":
            if not path:
                return orjson.Fragment(turn.input or b"{}")
            return walk(expression, self._parse("input", turn.input or b"{}"), path=path)
        if root == "history":
            return walk(expression, self._history(), path=path)
        if root == "session":
            wants_history = "id" not in path[:1]
            session = {"id": turn.session_id, "history": self._history() if wants_history else []}
            return walk(expression, session, path=path)
        if root in _IDENTITIES:
            return walk(expression, getattr(turn, root), path=path)
        known = ", ".join(("input", "calls", "session", "history", *_IDENTITIES))
        raise template_invalid(expression.text, f"{root!r} is not one of {known}")

    def _history(self) -> list[dict[str, Any]]:
        if "history" not in self._parsed:
            self._parsed["history"] = [
                {
                    "run_id": run.run_id,
                    "ordinal": run.ordinal,
                    "agent": run.agent,
                    "input": orjson.loads(run.input or b"{}"),
                    "result": orjson.loads(run.result or b"null"),
                }
                for run in self._turn.history
            ]
        return self._parsed["history"]  # type: ignore[no-any-return]  # what is above

    def _look_up_call(self, expression: Expression) -> Any:
        planned, path = self._turn.planned, expression.path
        if not path:
            return [self._describe(call) for call in planned]
        index = path[0]
        if not isinstance(index, int) or not -len(planned) <= index < len(planned):
            raise template_invalid(expression.text, f"the run has made {len(planned)} calls, counted from [0]")
        call = planned[index]
        if path[1:2] != ("result",):
            return walk(expression, self._describe(call), path=path[1:])
        outcome = self._turn.outcomes[call.call_id]
        if outcome.status != types_pb2.TOOL_STATUS_OK:
            raise _call_failed(outcome)
        if len(path) == 2:
            return orjson.Fragment(outcome.result or b"null")
        return walk(expression, self._parse(call.call_id, outcome.result or b"null"), path=path[2:])

    def _describe(self, call: events_pb2.PlannedCall) -> dict[str, Any]:
        outcome = self._turn.outcomes[call.call_id]
        succeeded = outcome.status == types_pb2.TOOL_STATUS_OK
        error = {"code": outcome.error.code, "reason": outcome.error.reason, "message": outcome.error.message}
        return {
            "call_id": call.call_id,
            "tool": call.tool,
            "arguments": self._parse(f"arguments of {call.call_id}", call.arguments or b"{}"),
            "status": types_pb2.ToolStatus.Name(outcome.status).removeprefix("TOOL_STATUS_").lower(),
            "result": self._parse(call.call_id, outcome.result or b"null") if succeeded else None,
            "error": None if succeeded else error,
            "cached": outcome.cached,
            "attempts": outcome.attempts,
        }


def _render_arguments(template: Template, scope: Scope) -> bytes:
    arguments = template.render_json(scope)
    if not arguments.lstrip().startswith(b"{"):
        expression = template.expressions[0].text if template.expressions else arguments.decode()
        raise template_invalid(expression, "the arguments of a call must be an object")
    return arguments


_IDENTITIES: Final = ("user_id", "run_id", "session_id", "tenant_id", "step")


def _call_failed(outcome: events_pb2.ToolCompleted) -> MainspringError:
    """A script that needs the result of a call that failed fails as the call did."""
    error = outcome.error
    code = getattr(grpc.StatusCode, error.code, grpc.StatusCode.UNKNOWN)
    failure = MainspringError(RULES.get(error.reason, Reason.TOOL_FAILED), error.message, code=code)
    failure.metadata = {**error.metadata, "tool": outcome.tool, "call_id": outcome.call_id}
    if error.reason not in RULES:
        failure.metadata["reason"] = error.reason
    return failure


def _count_words(turn: Turn) -> int:
    """What the model reads, in words: the measure of a scripted token."""
    return len(turn.input.split()) + sum(len(outcome.result.split()) for outcome in turn.outcomes.values())


def _compile_entry(entry: object, field: str) -> _Entry:
    if not isinstance(entry, Mapping):
        raise spec_invalid(field, "it is not an object")
    unknown = sorted(set(entry) - _ENTRY_FIELDS)
    if unknown:
        raise spec_invalid(f"{field}.{unknown[0]}", f"it is not one of {', '.join(sorted(_ENTRY_FIELDS))}")
    calls = tuple(_compile_call(call, f"{field}.calls[{index}]") for index, call in enumerate(entry.get("calls") or ()))
    delay_seconds = read_seconds(entry.get("delay", 0), field=f"{field}.delay")
    return _Entry(
        text=compile_template(str(entry.get("text") or "")),
        calls=calls,
        result=compile_template(entry["result"]) if "result" in entry else None,
        delay_seconds=min(delay_seconds, DELAY_SECONDS_MAX),
        deltas=int(entry.get("deltas", 0)),
        failure=_compile_failure(entry["fail"], f"{field}.fail") if entry.get("fail") else None,
    )


def _compile_call(call: object, field: str) -> tuple[str, Template]:
    if not isinstance(call, Mapping) or not isinstance(call.get("tool"), str):
        raise spec_invalid(field, "a call is an object with a tool and arguments")
    arguments = call.get("arguments") or {}
    if not isinstance(arguments, Mapping | str):
        raise spec_invalid(f"{field}.arguments", "arguments are an object, or one template that yields an object")
    return call["tool"], compile_template(arguments)


def _compile_failure(failure: object, field: str) -> _Failure:
    if not isinstance(failure, Mapping):
        raise spec_invalid(field, "it is an object with code, message and times")
    name = str(failure.get("code") or "UNKNOWN")
    if name == "OK" or name not in grpc.StatusCode.__members__:
        raise spec_invalid(f"{field}.code", f"{name!r} is not a gRPC error code")
    times = failure.get("times")
    if times is not None and (not isinstance(times, int) or times < 0):
        raise spec_invalid(f"{field}.times", f"{times!r} is not a number of times")
    return _Failure(grpc.StatusCode[name], compile_template(str(failure.get("message") or "The model failed.")), times)
