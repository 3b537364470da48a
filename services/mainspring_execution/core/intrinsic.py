"""The tools that execution serves itself: what they are called, what models are told of them, what they take."""

from __future__ import annotations

from typing import Any, Final

import orjson
from mainspring.v1 import types_pb2

from mainspring_execution.core.schema import Schema

SLEEP: Final = "run.sleep"
SIGNAL: Final = "run.wait_for_signal"
APPROVE: Final = "human.approve"
ASK: Final = "human.ask"
AGENT_PREFIX: Final = "agent."
HANDOFF_PREFIX: Final = "handoff."

TITLE_CHARACTERS_MAX: Final = 1_000
SIGNAL_CHARACTERS_MAX: Final = 100
ROLES: Final = ("runner", "operator", "admin")

# No worker may register a tool that begins so.
_PREFIXES: Final = ("run.", "human.", AGENT_PREFIX, HANDOFF_PREFIX)

# JSON Schemas: Any.
_DURATION: Final[dict[str, Any]] = {
    "description": "Seconds, or a duration such as 100ms, 30s, 5m or 1h.",
    "type": ["number", "string"],
    "minimum": 0,
}
_OF_PEOPLE: Final[dict[str, Any]] = {
    "answer_schema": {"description": "JSON Schema of the answer's data; left out: anything.", "type": "object"},
    "expires": {**_DURATION, "description": "How long an answer is waited for: seconds, or such as 5m or 1h."},
    "role": {"description": "The least role that may answer; left out: runner, the user.", "enum": list(ROLES)},
}
_TEXT: Final[dict[str, Any]] = {"type": "string", "minLength": 1, "maxLength": TITLE_CHARACTERS_MAX}


def is_intrinsic(tool: str) -> bool:
    """Whether execution serves a tool of this name itself."""
    return tool.startswith(_PREFIXES)


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _tool(name: str, description: str, *, schema: dict[str, Any]) -> types_pb2.Tool:
    return types_pb2.Tool(
        name=name,
        description=description,
        input_schema=orjson.dumps(schema),
        effect=types_pb2.EFFECT_CLASS_PURE,
        shared=True,
    )


TOOLS: Final = {
    tool.name: tool
    for tool in (
        _tool(
            SLEEP,
            "Waits for so many seconds, or until a moment: give one of both.",
            schema=_object(
                [],
                seconds=_DURATION,
                until={"description": "RFC 3339, as in 2026-11-24T03:06:12Z.", "type": "string"},
            ),
        ),
        _tool(
            SIGNAL,
            "Waits for a named signal from outside; answers with what it brings.",
            schema=_object(
                ["name"],
                name={"type": "string", "minLength": 1, "maxLength": SIGNAL_CHARACTERS_MAX},
                timeout=_DURATION,
            ),
        ),
        _tool(
            APPROVE,
            "Asks a person for leave and waits for it; a refusal is an error.",
            schema=_object(["title"], title=_TEXT, arguments={"description": "What it is about."}, **_OF_PEOPLE),
        ),
        _tool(
            ASK,
            "Asks a person a question and waits for the answer.",
            schema=_object(["question"], question=_TEXT, **_OF_PEOPLE),
        ),
    )
}


def describe(name: str, *, description: str = "") -> types_pb2.Tool | None:
    """What models are told of one of these tools; `description`: of the agent that it names."""
    if name.startswith(AGENT_PREFIX):
        told = (
            f"Has the agent {name.removeprefix(AGENT_PREFIX)} do something: {description} The arguments are its input."
        )
        return _tool(name, told, schema={"type": "object"})
    if name.startswith(HANDOFF_PREFIX):
        told = f"Hands the conversation over to the agent {name.removeprefix(HANDOFF_PREFIX)}, for good: {description}"
        return _tool(name, told, schema=_object([], reason={"description": "Why, in a few words.", "type": "string"}))
    return TOOLS.get(name)


SCHEMAS: Final = {name: Schema(orjson.loads(tool.input_schema)) for name, tool in TOOLS.items()}
