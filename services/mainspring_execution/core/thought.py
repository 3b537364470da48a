"""One model step: what a model is given, what it answers, and the bounds that an answer keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mainspring.v1 import events_pb2, types_pb2
from mainspring_kit.errors import MainspringError, Reason

from mainspring_execution.core.plan import CALLS_PER_STEP_MAX
from mainspring_execution.core.record import PAYLOAD_BYTES_MAX, make_call_id

TEXT_BYTES_MAX: Final = 1 << 20
ARGUMENTS_BYTES_MAX: Final = 1 << 20
# How much of an answer that was not taken its model sees again.
FAULTY_CHARACTERS_MAX: Final = 2_000


@dataclass(frozen=True, slots=True)
class Turn:
    """What a model step may look at; what the agent's specification says its model knows.

    `thoughts`: the run's earlier model steps. `failures`: the failed attempts at this one.
    `history`: the earlier completed runs of the session, oldest first. `tools`: those that the agent may call.
    """

    tenant_id: str
    user_id: str
    session_id: str
    run_id: str
    step: int
    # Which attempt at this step, from 1, whoever made the others.
    attempt: int
    input: bytes
    planned: Sequence[events_pb2.PlannedCall]
    outcomes: Mapping[str, events_pb2.ToolCompleted]
    history: Sequence[types_pb2.Run] = ()
    thoughts: Sequence[events_pb2.AgentThinking] = ()
    failures: Sequence[events_pb2.AttemptFailed] = ()
    tools: Sequence[types_pb2.Tool] = ()
    # The first model step of the agent, where others had the run before.
    first_step: int = 1
    # Which of the model's fallbacks is asked; 0: the model itself.
    fallback: int = 0


@dataclass(frozen=True, slots=True)
class WantedCall:
    """A tool call that the model asks for; `arguments` is a JSON object."""

    tool: str
    arguments: bytes


@dataclass(frozen=True, slots=True)
class Thought:
    """What a model step answers. With a result it ends the run, after its calls.

    `fault`: why the answer can't be taken; the model may do better when it is told.
    """

    model: str
    text: str
    usage: types_pb2.Usage
    calls: tuple[WantedCall, ...] = ()
    result: bytes = b""
    provider_state: bytes = b""
    fault: MainspringError | None = None


def record_thought(thought: Thought, *, run_id: str, seq: int, step: int) -> events_pb2.AgentThinking:
    """The event payload of a thought; PAYLOAD_TOO_LARGE or QUEUE_FULL when it is over a bound."""
    _check_bounds(thought, step=step)
    thinking = events_pb2.AgentThinking(
        step=step,
        text=thought.text,
        model=thought.model,
        usage=thought.usage,
        planned_calls=[
            events_pb2.PlannedCall(
                call_id=make_call_id(run_id, seq, index=index), tool=call.tool, arguments=call.arguments
            )
            for index, call in enumerate(thought.calls)
        ],
        provider_state=thought.provider_state,
        result=thought.result,
    )
    _check_size("answer", thinking.ByteSize(), limit_bytes=PAYLOAD_BYTES_MAX)
    return thinking


def _check_bounds(thought: Thought, *, step: int) -> None:
    text_bytes = len(thought.text) if thought.text.isascii() else len(thought.text.encode())
    _check_size("text", text_bytes, limit_bytes=TEXT_BYTES_MAX)
    for call in thought.calls:
        _check_size("arguments", len(call.arguments), limit_bytes=ARGUMENTS_BYTES_MAX)
    if len(thought.calls) > CALLS_PER_STEP_MAX:
        raise MainspringError(
            Reason.QUEUE_FULL,
            f"Model step {step} asks for {len(thought.calls)} tool calls, a step may ask for {CALLS_PER_STEP_MAX}: "
            "spread them over several steps.",
            queue="planned_calls",
            limit=CALLS_PER_STEP_MAX,
        )


def _check_size(field: str, size_bytes: int, *, limit_bytes: int) -> None:
    if size_bytes > limit_bytes:
        raise MainspringError(
            Reason.PAYLOAD_TOO_LARGE,
            f"The {field} of a model step has {size_bytes} bytes, at most {limit_bytes} are kept: store it elsewhere "
            "and pass its address.",
            field=field,
            bytes=size_bytes,
            limit=limit_bytes,
        )
