"""An unsafe call whose executor or worker died in mid-call: what a person is asked, and what the answer means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import orjson
from mainspring.v1 import events_pb2, types_pb2
from mainspring_kit.errors import MainspringError, Reason

from mainspring_execution.core.intrinsic import TITLE_CHARACTERS_MAX
from mainspring_execution.core.progress import Progress
from mainspring_execution.core.record import error_value
from mainspring_execution.core.waits import canonical

ANSWER_SCHEMA: Final = canonical(
    {
        "type": "object",
        "properties": {
            "action": {"enum": ["retry", "result", "fail"]},
            "result": {"description": "With the action result: what the call would have answered."},
        },
        "required": ["action"],
        "additionalProperties": False,
        "if": {"properties": {"action": {"const": "result"}}},
        "then": {"required": ["result"]},
    }
)


@dataclass(frozen=True, slots=True)
class Ask:
    """A person has to say what became of this call."""

    intent: events_pb2.ToolExecuting


@dataclass(frozen=True, slots=True)
class Retry:
    """The call is made again, under its id."""


@dataclass(frozen=True, slots=True)
class WaitForAnswer:
    """The question is open."""


def resolve_unknown(
    progress: Progress, intent: events_pb2.ToolExecuting
) -> Ask | Retry | WaitForAnswer | events_pb2.ToolCompleted:
    """What becomes of a call of which nobody knows what it did."""
    if intent.call_id in progress.approvals:
        return WaitForAnswer()
    answer = progress.answers.get(intent.call_id)
    if answer is None:
        return Ask(intent)
    # Any: what the person sent, a JSON value of the schema above.
    data: Any = orjson.loads(answer.data) if answer.data else {}
    action = data.get("action") if answer.decision == types_pb2.APPROVAL_DECISION_ALLOW else "fail"
    if action == "retry":
        return Retry()
    outcome = events_pb2.ToolCompleted(
        call_id=intent.call_id, tool=intent.tool, attempts=progress.attempts[intent.call_id]
    )
    if action == "result":
        outcome.status = types_pb2.TOOL_STATUS_OK
        outcome.result = orjson.dumps(data.get("result"))
    else:
        outcome.status = types_pb2.TOOL_STATUS_ERROR
        outcome.error.CopyFrom(error_value(_outcome_unknown(intent)))
    return outcome


def make_question(intent: events_pb2.ToolExecuting) -> events_pb2.ApprovalRequested:
    """What a person is asked, without its id."""
    title = f"The outcome of {intent.tool} is not known: make the call again, give its result, or let it fail?"
    return events_pb2.ApprovalRequested(
        title=title[:TITLE_CHARACTERS_MAX],
        arguments=_canonical_text(intent.arguments),
        answer_schema=ANSWER_SCHEMA,
        role="runner",
        call_id=intent.call_id,
        kind=types_pb2.APPROVAL_KIND_UNKNOWN_OUTCOME,
    )


def _canonical_text(arguments: bytes) -> bytes:
    return canonical(orjson.loads(arguments)) if arguments else b"{}"


def _outcome_unknown(intent: events_pb2.ToolExecuting) -> MainspringError:
    return MainspringError(
        Reason.WORKER_LOST,
        f"What the unsafe tool {intent.tool} did (call {intent.call_id}) is not known, and it is not made again: look "
        "at its effect before you call it once more.",
        tool=intent.tool,
        call_id=intent.call_id,
    )
