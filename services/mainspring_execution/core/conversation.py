"""What a conversing model is told: the session's earlier runs, the input, the steps so far; cut down by a policy.

Knows no provider: models/ turns the parts into what goes over the wire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import orjson
from mainspring.v1 import events_pb2, types_pb2

from mainspring_execution.core.thought import Turn

# English text and JSON in the usual tokenizers: close enough to keep within a window.
BYTES_PER_TOKEN: Final = 4
# More than any model takes: a bound for the memory, where a specification has none for the model.
TOKENS_DEFAULT: Final = 1_000_000
KEEP_LAST_DEFAULT: Final = 4
# What is left of a tool's result that had to be shortened.
SHORTENED_CHARACTERS: Final = 200
GO_ON: Final = "Go on."
# What a part costs beside its text.
_PART_TOKENS: Final = 8


@dataclass(frozen=True, slots=True)
class Said:
    """Plain text of one side: `user` or `assistant`."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """A tool call and what became of it, as text."""

    tool: str
    arguments: bytes
    outcome: str
    is_error: bool
    # Unique in the run, letters, digits and underscores only: what every wire takes.
    wire_id: str


@dataclass(frozen=True, slots=True)
class Stepped:
    """A finished model step with its calls. `state`: the provider's own, of which only that one can make sense."""

    text: str
    calls: tuple[Called, ...]
    model: str
    state: bytes


Part = Said | Stepped


@dataclass(frozen=True, slots=True)
class Window:
    """How much a model is told. The last `keep_last` steps stay whole if they can."""

    tokens_max: int = TOKENS_DEFAULT
    keep_last: int = KEEP_LAST_DEFAULT


def compose(turn: Turn, window: Window, *, instructions: str = "") -> list[Part]:
    """The conversation up to this step, cut down until it fits the window together with the instructions.

    The oldest history goes first, then the results of the oldest steps are shortened, then those steps go with their
    calls, last the results of the steps that were to stay whole. What the user asked is never cut.
    """
    history = [_converse(run) for run in turn.history]
    steps = [_retell(thinking, turn.outcomes) for thinking in turn.thoughts]
    asked = [Said("user", speak(turn.input or b"{}"))]
    faults = [part for failure in turn.failures for part in _complain(failure)]
    fixed = [*asked, *faults, Said("system", instructions)]
    left = window.tokens_max - sum(map(measure, fixed)) - sum(_measure_tool(tool) for tool in turn.tools)
    history, steps = _fit(history, steps, tokens_max=left, keep_last=window.keep_last)
    parts: list[Part] = [part for pair in history for part in pair]
    # A conversation that ends with the model's own words would have it go on with them.
    spoken = [Said("user", GO_ON)] if steps and not steps[-1].calls and not faults else []
    return [*parts, *asked, *steps, *spoken, *faults]


def measure(part: Part) -> int:
    """About how many tokens a part has."""
    if isinstance(part, Said):
        return _PART_TOKENS + len(part.text.encode()) // BYTES_PER_TOKEN
    size_bytes = max(len(part.text.encode()) + sum(len(call.arguments) for call in part.calls), len(part.state))
    size_bytes += sum(len(call.outcome.encode()) for call in part.calls)
    return _PART_TOKENS * (1 + 2 * len(part.calls)) + size_bytes // BYTES_PER_TOKEN


def speak(value: bytes) -> str:
    """A JSON value as one would say it: a text, and an object that is nothing but `text`, as they are; else as JSON."""
    parsed: Any = orjson.loads(value)
    if isinstance(parsed, dict) and parsed.keys() == {"text"}:
        parsed = parsed["text"]
    return parsed if isinstance(parsed, str) else value.decode()


def _converse(run: types_pb2.Run) -> list[Part]:
    return [Said("user", speak(run.input or b"{}")), Said("assistant", speak(run.result or b"null"))]


def _retell(thinking: events_pb2.AgentThinking, outcomes: Mapping[str, events_pb2.ToolCompleted]) -> Stepped:
    calls = tuple(_recall(call, outcomes.get(call.call_id)) for call in thinking.planned_calls)
    return Stepped(thinking.text, calls, thinking.model, thinking.provider_state)


def _recall(call: events_pb2.PlannedCall, outcome: events_pb2.ToolCompleted | None) -> Called:
    _, seq, index = call.call_id.rsplit(".", 2)
    if outcome is None:
        told, is_error = "It has not ended.", True
    elif outcome.status == types_pb2.TOOL_STATUS_OK:
        told, is_error = (outcome.result or b"null").decode(), False
    else:
        error = {"code": outcome.error.code, "reason": outcome.error.reason, "message": outcome.error.message}
        told, is_error = orjson.dumps({"error": error}).decode(), True
    return Called(call.tool, call.arguments or b"{}", told, is_error, f"call_{seq}_{index}")


def _complain(failure: events_pb2.AttemptFailed) -> list[Part]:
    """What the model is told of an answer of its own that was not taken; nothing of other failures."""
    error = failure.error
    if error.reason != "RESULT_INVALID":
        return []
    # What follows is for whoever made the agent.
    what = error.message.partition(" Register a version")[0]
    told = f"Your last answer was not taken: {what} Answer again, rightly, and say nothing about this."
    answer = error.metadata.get("answer")
    return [*([Said("assistant", answer)] if answer else []), Said("user", told)]


def _fit(
    history: list[list[Part]], steps: list[Stepped], *, tokens_max: int, keep_last: int
) -> tuple[list[list[Part]], list[Stepped]]:
    sizes = [sum(map(measure, pair)) for pair in history]
    total = sum(sizes) + sum(map(measure, steps))
    dropped = 0
    while total > tokens_max and dropped < len(history):
        total -= sizes[dropped]
        dropped += 1
    steps = list(steps)
    old = max(0, len(steps) - keep_last)
    total -= _shorten(steps, range(old), spare=total - tokens_max)
    gone = 0
    while total > tokens_max and gone < old:
        total -= measure(steps[gone])
        gone += 1
    _shorten(steps, range(gone, len(steps)), spare=total - tokens_max)
    return history[dropped:], steps[gone:]


def _shorten(steps: list[Stepped], indices: Sequence[int], *, spare: int) -> int:
    """Shortens results in place, the oldest first, until so many tokens are spared; answers how many were."""
    spared = 0
    for index in indices:
        if spared >= spare:
            break
        before = measure(steps[index])
        calls = tuple(replace(call, outcome=_cut(call.outcome)) for call in steps[index].calls)
        steps[index] = replace(steps[index], calls=calls)
        spared += before - measure(steps[index])
    return spared


def _cut(text: str) -> str:
    if len(text) <= SHORTENED_CHARACTERS * 2:
        return text
    return f"{text[:SHORTENED_CHARACTERS]}… ({len(text) - SHORTENED_CHARACTERS} characters left out)"


def _measure_tool(tool: types_pb2.Tool) -> int:
    return _PART_TOKENS + (len(tool.description.encode()) + len(tool.input_schema)) // BYTES_PER_TOKEN
