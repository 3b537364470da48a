"""The provider openai: chat completions, which every compatible server speaks, streamed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import orjson
from mainspring.v1 import types_pb2

from mainspring_execution.core.conversation import Part, Said
from mainspring_execution.core.tool_names import wire_name
from mainspring_execution.models.answer import CUT, ENDED, REFUSED, Draft, DraftCall, Question
from mainspring_execution.models.endpoint import Endpoint
from mainspring_execution.models.prices import Tokens

_STOPS: Final = {"length": CUT, "content_filter": REFUSED}

# Any in this module: JSON for the wire, and chunks, whose members a compatible server may leave out whatever their
# types say.


async def ask(client: Any, request: Mapping[str, Any], *, emit: Callable[[str], None]) -> Draft:
    """One streamed answer. Raises what the SDK raises; a chunk that makes no sense is a TypeError or the like."""
    draft = Draft(emit)
    slots: dict[int, DraftCall] = {}
    async with await client.chat.completions.create(**request) as stream:
        async for chunk in stream:
            if chunk.usage is not None:
                draft.tokens = _count(chunk.usage)
            for choice in chunk.choices or ():
                _take(choice, draft, slots=slots)
    draft.end()
    return draft


def make_request(endpoint: Endpoint, question: Question) -> dict[str, Any]:
    """The arguments of a create."""
    request: dict[str, Any] = {
        "model": endpoint.name,
        "messages": make_messages(question),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if question.tools:
        request["tools"] = [_describe(tool) for tool in question.tools]
    if endpoint.temperature is not None:
        request["temperature"] = endpoint.temperature
    if endpoint.max_tokens is not None:
        # The provider's newer models take the new name only, other servers the old one.
        request["max_tokens" if endpoint.base_url else "max_completion_tokens"] = endpoint.max_tokens
    if endpoint.structured and question.schema is not None:
        schema = {"name": "result", "schema": dict(question.schema), "strict": False}
        request["response_format"] = {"type": "json_schema", "json_schema": schema}
    if endpoint.options:
        request["extra_body"] = dict(endpoint.options)
    return request


def make_messages(question: Question) -> list[dict[str, Any]]:
    """The conversation as chat messages."""
    messages: list[dict[str, Any]] = []
    if question.instructions:
        messages.append({"role": "system", "content": question.instructions})
    for part in question.parts:
        messages.extend(_write(part))
    return messages


def _write(part: Part) -> Sequence[dict[str, Any]]:
    if isinstance(part, Said):
        return [{"role": part.role, "content": part.text}]
    if not part.calls:
        return [{"role": "assistant", "content": part.text}]
    calls = [
        {
            "id": call.wire_id,
            "type": "function",
            "function": {"name": wire_name(call.tool), "arguments": call.arguments.decode()},
        }
        for call in part.calls
    ]
    asked = {"role": "assistant", "content": part.text or None, "tool_calls": calls}
    return [asked, *({"role": "tool", "tool_call_id": call.wire_id, "content": call.outcome} for call in part.calls)]


def _describe(tool: types_pb2.Tool) -> dict[str, Any]:
    function = {
        "name": wire_name(tool.name),
        "description": tool.description,
        "parameters": orjson.loads(tool.input_schema or b'{"type":"object"}'),
    }
    return {"type": "function", "function": function}


def _take(choice: Any, draft: Draft, *, slots: dict[int, DraftCall]) -> None:
    delta = choice.delta
    if delta is not None:
        if delta.content:
            draft.say(delta.content)
        if delta.refusal:
            draft.stop = REFUSED
        for piece in delta.tool_calls or ():
            _take_call(piece, draft, slots=slots)
    if choice.finish_reason and draft.stop != REFUSED:
        draft.stop = _STOPS.get(choice.finish_reason, ENDED)


def _take_call(piece: Any, draft: Draft, *, slots: dict[int, DraftCall]) -> None:
    # Some servers number all calls 0 and tell them apart by their ids alone.
    index = piece.index or 0
    call = slots.get(index)
    if call is None or (piece.id and call.wire_id and piece.id != call.wire_id):
        call = slots[index] = DraftCall()
        draft.calls.append(call)
    call.wire_id = call.wire_id or piece.id or ""
    if piece.function is not None:
        call.name = call.name or piece.function.name or ""
        arguments = piece.function.arguments or ""
        draft.grow(arguments)
        call.arguments += arguments


def _count(usage: Any) -> Tokens:
    details = usage.prompt_tokens_details
    return Tokens(
        input=usage.prompt_tokens or 0,
        output=usage.completion_tokens or 0,
        cached=(details.cached_tokens or 0) if details is not None else 0,
    )
