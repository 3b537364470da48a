"""A stand-in for a model, to run offline: a server that takes chat completions and answers by rule, word by word.

It knows no more than a real model would: what it is told in the messages, and which tools it is offered.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

WORD_SECONDS = 0.03

# JSON as it is on the wire: Any, here and below.
Call = tuple[str, dict[str, Any]]


@asynccontextmanager
async def model_server() -> AsyncIterator[str]:
    """Serves on a free port of this machine, and yields the `base_url` for agents."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


async def complete(request: web.Request) -> web.StreamResponse:
    """One chat completion, streamed."""
    asked = await request.json()
    text, calls = decide(asked["messages"], {tool["function"]["name"] for tool in asked.get("tools", ())})
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for chunk in chunks(text, calls, prompt_tokens=len(str(asked).split())):
        await response.write(b"data: " + chunk + b"\n\n")
        await asyncio.sleep(WORD_SECONDS)
    await response.write(b"data: [DONE]\n\n")
    return response


def decide(messages: list[dict[str, Any]], tools: set[str]) -> tuple[str, list[Call]]:
    """What to say and whom to call, after what has been said and done so far."""
    wish = next(message["content"] for message in messages if message["role"] == "user")
    number = re.search(r"\d{4}", wish)
    if number is None:
        return "Which order is it about? Please write its number.", []
    done = outcomes(messages)
    if (order := done.get("desk__find-order")) is None:
        return "Let me look your order up.", [("desk__find-order", {"order": number[0]})]
    if "error" in order:
        return f"I am sorry: {order['error']['message']}", []
    amount = f"{order['amount_eur']:.2f} EUR"
    if "handoff__refunds" in tools:
        said = f"That is the {order['article']} for {amount}. My colleague will see to your money."
        return said, [("handoff__refunds", {"reason": "wants money back"})]
    if (approval := done.get("human__approve")) is None:
        title = f"Give {amount} back for order {order['order']}?"
        return "Before I give money back I ask a person.", [("human__approve", {"title": title, "arguments": order})]
    if approval.get("decision") != "allow":
        return f"I am sorry, there is no money back for order {order['order']}: a person has decided against it.", []
    if "desk__refund" not in done:
        refund = {"order": order["order"], "amount_eur": order["amount_eur"]}
        return "It was agreed to. I give the money back.", [("desk__refund", refund)]
    return f"{amount} for your {order['article']} are on their way back to you.", []


def outcomes(messages: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last result of each tool that was called."""
    names = {call["id"]: call["function"]["name"] for message in messages for call in message.get("tool_calls") or ()}
    told = [message for message in messages if message["role"] == "tool"]
    return {names[message["tool_call_id"]]: json.loads(message["content"]) for message in told}


def chunks(text: str, calls: list[Call], *, prompt_tokens: int) -> Iterator[bytes]:
    """The text word by word, the calls, the end, and what it took."""
    words = re.findall(r"\S+\s*", text)
    for word in words:
        yield chunk({"content": word})
    for index, (name, arguments) in enumerate(calls):
        function = {"name": name, "arguments": json.dumps(arguments)}
        yield chunk({"tool_calls": [{"index": index, "id": f"call_{index}", "type": "function", "function": function}]})
    yield chunk({}, finish_reason="tool_calls" if calls else "stop")
    yield chunk(usage={"prompt_tokens": prompt_tokens, "completion_tokens": len(words), "total_tokens": 0})


def chunk(delta: dict[str, Any] | None = None, *, finish_reason: str | None = None, **fields: Any) -> bytes:
    """One chunk of an answer; without a delta one that has none."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
    base = {"id": "answer", "object": "chat.completion.chunk", "created": 0, "model": "help-desk"}
    return json.dumps({**base, "choices": choices, **fields}).encode()
