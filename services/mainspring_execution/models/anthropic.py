"""The provider anthropic: messages, streamed. Thinking is kept as the provider's own state, to be shown it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import orjson
from mainspring.v1 import types_pb2

from mainspring_execution.core.conversation import Called, Part, Said, Stepped
from mainspring_execution.core.tool_names import wire_name
from mainspring_execution.models.answer import CUT, ENDED, REFUSED, Draft, DraftCall, Question
from mainspring_execution.models.endpoint import Endpoint
from mainspring_execution.models.prices import Tokens

# The wire asks for a bound; this one all models of the last years take.
TOKENS_MAX_DEFAULT: Final = 8_192
SILENCE: Final = "(nothing)"

_STOPS: Final = {"max_tokens": CUT, "model_context_window_exceeded": CUT, "refusal": REFUSED}
_KEPT: Final = ("thinking", "redacted_thinking")

# Any in this module: JSON for the wire, and the SDK's events, which are as the server has them.


async def ask(client: Any, request: Mapping[str, Any], *, emit: Callable[[str], None]) -> Draft:
    """One streamed answer. Raises what the SDK and its HTTP client raise; an event without sense is a TypeError etc."""
    draft = Draft(emit)
    blocks: dict[int, dict[str, Any]] = {}
    usage: dict[str, int] = {}
    stop, has_ended = "", False
    async with await client.messages.create(**request) as stream:
        async for event in stream:
            if event.type == "message_start":
                _count(usage, event.message.usage)
            elif event.type == "content_block_start":
                blocks[event.index] = event.content_block.model_dump(exclude_none=True)
            elif event.type == "content_block_delta":
                _go_on(blocks[event.index], event.delta, draft=draft)
            elif event.type == "message_delta":
                stop = event.delta.stop_reason or stop
                _count(usage, event.usage)
            elif event.type == "message_stop":
                has_ended = True
    draft.stop = _STOPS.get(stop, ENDED) if has_ended and stop else ""
    _collect(draft, [blocks[index] for index in sorted(blocks)])
    read, written = usage.get("cache_read_input_tokens", 0), usage.get("cache_creation_input_tokens", 0)
    total = usage.get("input_tokens", 0) + read + written
    draft.tokens = Tokens(input=total, output=usage.get("output_tokens", 0), cached=read, written=written)
    return draft


def make_request(endpoint: Endpoint, question: Question) -> dict[str, Any]:
    """The arguments of a create."""
    request: dict[str, Any] = {
        "model": endpoint.name,
        "max_tokens": endpoint.max_tokens or TOKENS_MAX_DEFAULT,
        "messages": make_messages(endpoint, question.parts),
        "stream": True,
    }
    if question.instructions:
        request["system"] = question.instructions
    called = {call.tool for part in question.parts if isinstance(part, Stepped) for call in part.calls}
    if question.tools:
        request["tools"] = [_describe(tool) for tool in question.tools]
    elif called:
        # The wire takes no conversation with calls unless there are tools; none of these may be called.
        request["tools"] = [_describe(types_pb2.Tool(name=name)) for name in sorted(called)]
        request["tool_choice"] = {"type": "none"}
    if endpoint.structured and question.schema is not None:
        request["output_config"] = {"format": {"type": "json_schema", "schema": dict(question.schema)}}
    # The SDK has no argument for it any more; models that still take it do.
    tempered = {} if endpoint.temperature is None else {"temperature": endpoint.temperature}
    if extra := {**tempered, **endpoint.options}:
        request["extra_body"] = extra
    return request


def make_messages(endpoint: Endpoint, parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The conversation as messages of blocks."""
    messages: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, Said):
            messages.append({"role": part.role, "content": part.text.strip() or SILENCE})
            continue
        blocks, ids = _write(endpoint, part)
        messages.append({"role": "assistant", "content": blocks})
        if part.calls:
            results = [_write_result(call, wire_id) for call, wire_id in zip(part.calls, ids, strict=True)]
            messages.append({"role": "user", "content": results})
    return messages


def _write(endpoint: Endpoint, step: Stepped) -> tuple[list[dict[str, Any]], list[str]]:
    """The blocks of an earlier step, as they were if this model made them, and the ids of its calls."""
    if step.state and step.model == endpoint.title:
        kept: list[dict[str, Any]] = orjson.loads(step.state)
        ids = [block["id"] for block in kept if block["type"] == "tool_use"]
        if len(ids) == len(step.calls):
            return kept, ids
    said = [{"type": "text", "text": step.text.strip() or SILENCE}] if step.text.strip() or not step.calls else []
    calls = [
        {"type": "tool_use", "id": call.wire_id, "name": wire_name(call.tool), "input": orjson.loads(call.arguments)}
        for call in step.calls
    ]
    return [*said, *calls], [call.wire_id for call in step.calls]


def _write_result(call: Called, wire_id: str) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": wire_id, "content": call.outcome, "is_error": call.is_error}


def _describe(tool: types_pb2.Tool) -> dict[str, Any]:
    schema = orjson.loads(tool.input_schema or b'{"type":"object"}')
    return {"name": wire_name(tool.name), "description": tool.description, "input_schema": schema}


def _go_on(block: dict[str, Any], delta: Any, *, draft: Draft) -> None:
    if delta.type == "text_delta":
        block["text"] += delta.text
        draft.say(delta.text)
    elif delta.type == "input_json_delta":
        draft.grow(delta.partial_json)
        block["json"] = block.get("json", "") + delta.partial_json
    elif delta.type == "thinking_delta":
        draft.grow(delta.thinking)
        block["thinking"] += delta.thinking
    elif delta.type == "signature_delta":
        block["signature"] = delta.signature


def _collect(draft: Draft, blocks: list[dict[str, Any]]) -> None:
    """The calls, and the blocks as state where the log alone could not make them again."""
    draft.end()
    for block in blocks:
        if block["type"] == "tool_use":
            arguments = block.pop("json", "") or orjson.dumps(block.get("input") or {}).decode()
            draft.calls.append(DraftCall(block["id"], block["name"], arguments))
            block["input"] = _parse(arguments)
    if any(block["type"] in _KEPT for block in blocks):
        draft.state = orjson.dumps([block for block in blocks if block.get("text") != ""])


def _parse(arguments: str) -> Any:
    try:
        return orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return {}  # the answer is not taken then


def _count(usage: dict[str, int], told: Any) -> None:
    """Later figures stand for the whole answer, not for what came since."""
    for name in ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"):
        figure = getattr(told, name, None)
        if figure is not None:
            usage[name] = figure
