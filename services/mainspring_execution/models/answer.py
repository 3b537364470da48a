"""An answer as it comes over a provider's wire, and what it means for the run: calls, a result, or a fault to mend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import orjson
from mainspring.v1 import types_pb2
from mainspring_kit.errors import MainspringError, Reason

from mainspring_execution.core.conversation import Part
from mainspring_execution.core.thought import FAULTY_CHARACTERS_MAX, WantedCall
from mainspring_execution.core.tool_names import tool_named
from mainspring_execution.models.endpoint import Endpoint
from mainspring_execution.models.faults import model_failed
from mainspring_execution.models.prices import Tokens

# Well over what a step may keep: an answer that grows for ever must not fill the memory until then.
ANSWER_CHARACTERS_MAX: Final = 16 << 20

ENDED: Final = "ended"
CUT: Final = "cut"
REFUSED: Final = "refused"


@dataclass(frozen=True, slots=True)
class Question:
    """What a provider is asked. `schema`: the output_schema, JSON values (Any); None: any text will do."""

    instructions: str
    parts: Sequence[Part]
    tools: Sequence[types_pb2.Tool]
    schema: Mapping[str, Any] | None


@dataclass(slots=True)
class DraftCall:
    """A call of a tool as far as it has come; `arguments` is JSON text."""

    wire_id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(slots=True)
class Draft:
    """An answer as far as it has come. `stop` empty: it has not ended."""

    emit: Callable[[str], None]
    text: str = ""
    calls: list[DraftCall] = field(default_factory=list)
    stop: str = ""
    tokens: Tokens = field(default_factory=Tokens)
    state: bytes = b""
    _characters: int = 0
    _pieces: list[str] = field(default_factory=list)

    def say(self, piece: str) -> None:
        """Text that goes on."""
        self.grow(piece)
        self._pieces.append(piece)
        self.emit(piece)

    def grow(self, piece: str) -> None:
        """Counts what has come; PAYLOAD_TOO_LARGE."""
        self._characters += len(piece)
        if self._characters > ANSWER_CHARACTERS_MAX:
            raise MainspringError(
                Reason.PAYLOAD_TOO_LARGE,
                f"The model's answer has more than {ANSWER_CHARACTERS_MAX} characters: give it a max_tokens.",
                field="answer",
                bytes=self._characters,
                limit=ANSWER_CHARACTERS_MAX,
            )

    def end(self) -> None:
        """Everything has come."""
        self.text = "".join(self._pieces)


def check_end(draft: Draft, endpoint: Endpoint, *, step: int) -> None:
    """MODEL_FAILED unless the answer has ended as it should."""
    if draft.stop == CUT:
        what = "had no more tokens for its answer. Raise model.max_tokens, or ask for less."
        raise model_failed(endpoint, grpc.StatusCode.FAILED_PRECONDITION, what=what, step=step)
    if draft.stop == REFUSED:
        what = "refused to answer. Look at what it was asked, and at its provider's rules."
        raise model_failed(endpoint, grpc.StatusCode.FAILED_PRECONDITION, what=what, step=step)
    if draft.stop != ENDED:
        raise model_failed(endpoint, grpc.StatusCode.UNAVAILABLE, what="broke off in its answer.", step=step)


def conclude(draft: Draft, *, tools: Sequence[str], wants_json: bool) -> tuple[tuple[WantedCall, ...], bytes]:
    """The calls that the answer asks for, or the result that it is: without calls an answer ends the run.

    RESULT_INVALID where it can't be taken; the model might do better when it is told.
    """
    if draft.calls:
        calls = [_read_call(call, f"calls[{index}]", tools=tools) for index, call in enumerate(draft.calls)]
        return tuple(calls), b""
    if not draft.text.strip():
        raise answer_invalid("$", "it has neither text nor calls", answer="")
    return (), _read_json(draft.text) if wants_json else orjson.dumps(draft.text)


def answer_invalid(path: str, fault: str, *, answer: str) -> MainspringError:
    """RESULT_INVALID for an answer; `answer` is kept, so that the model sees what it said."""
    return MainspringError(
        Reason.RESULT_INVALID,
        f"The model's answer is not right at {path}: {fault}.",
        path=path,
        answer=answer[:FAULTY_CHARACTERS_MAX],
    )


def _read_call(call: DraftCall, path: str, *, tools: Sequence[str]) -> WantedCall:
    tool = tool_named(call.name, tools)
    arguments = call.arguments.strip() or "{}"
    try:
        is_object = isinstance(orjson.loads(arguments), dict)
    except orjson.JSONDecodeError:
        is_object = False
    if not is_object:
        fault = f"the arguments of {tool} are not a JSON object: {arguments[:FAULTY_CHARACTERS_MAX]}"
        raise answer_invalid(f"{path}.arguments", fault, answer="")
    return WantedCall(tool, arguments.encode())


def _read_json(text: str) -> bytes:
    """The JSON value that a text is, or that it holds between fences, as models like to write it."""
    bare = text.strip()
    if bare.startswith("```") and bare.endswith("```"):
        bare = bare[3:-3].removeprefix("json").strip()
    try:
        orjson.loads(bare)
    except orjson.JSONDecodeError as error:
        raise answer_invalid("$", f"it is not JSON: {error}", answer=text) from error
    return bare.encode()
