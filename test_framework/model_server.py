"""A model provider on loopback: speaks the wire formats of both providers over real HTTP, and misbehaves on demand."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web

# JSON: Any.
Json = dict[str, Any]


@dataclass(slots=True)
class Asked:
    """One request that came."""

    path: str
    headers: dict[str, str]
    body: Json


@dataclass(frozen=True, slots=True)
class Reply:
    """How one request is answered: with a status other than 200 and a body, or with a stream of frames.

    `end`: what comes after the frames: `whole`: the end of it, `cut`: the connection breaks, `short`: the answer
    ends as if that were all, `hang`: nothing, until the caller goes away.
    """

    frames: Sequence[bytes] = ()
    end: str = "whole"
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


Speaker = Callable[[Asked], Reply | Awaitable[Reply]]


class ModelServer:
    """Answers each request with the next reply, in order; the last one goes on. `asked`: what came."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.replies: deque[Reply | Speaker] = deque()
        self.url = ""
        self.hung = asyncio.Event()
        self.gone = asyncio.Event()

    def base_url(self, provider: str) -> str:
        """What an agent of this provider is given."""
        return f"{self.url}/v1" if provider == "openai" else self.url

    def script(self, *replies: Reply | Speaker) -> None:
        """What the next requests get."""
        self.replies = deque(replies)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Any request."""
        asked = Asked(
            request.path,
            {name.lower(): text for name, text in request.headers.items()},
            orjson.loads(await request.read()),
        )
        self.asked.append(asked)
        reply = self.replies.popleft() if len(self.replies) > 1 else self.replies[0]
        if not isinstance(reply, Reply):
            made = reply(asked)
            reply = made if isinstance(made, Reply) else await made
        if reply.status != 200:
            return web.Response(
                status=reply.status, body=reply.body, headers={"content-type": "application/json", **reply.headers}
            )
        response = web.StreamResponse(headers={"content-type": "text/event-stream", **reply.headers})
        await response.prepare(request)
        for frame in reply.frames:
            await response.write(frame)
        if reply.end == "cut" and request.transport is not None:
            request.transport.abort()
        elif reply.end == "hang":
            self.hung.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.gone.set()
        return response


@asynccontextmanager
async def model_server() -> AsyncIterator[ModelServer]:
    """A server on a free port of loopback."""
    server = ModelServer()
    app = web.Application(client_max_size=64 << 20)
    app.router.add_post("/{path:.*}", server.answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        server.url = f"http://{host}:{port}"
        yield server
    finally:
        await runner.cleanup()


def openai_frames(
    pieces: Sequence[str] = (),
    calls: Sequence[tuple[str, str]] = (),
    *,
    finish: str = "",
    usage: Json | None = None,
    ends: bool = True,
) -> list[bytes]:
    """The chunks of a chat completion: its text in pieces, its calls (name, arguments) beside each other in pieces."""
    frames = [_chunk({"role": "assistant", "content": ""})]
    frames += [_chunk({"content": piece}) for piece in pieces]
    for index, (name, _) in enumerate(calls):
        function = {"name": name, "arguments": ""}
        frames.append(_chunk({"tool_calls": [{"index": index, "id": f"call_{index}x", "function": function}]}))
    halves = [(arguments[: len(arguments) // 2], arguments[len(arguments) // 2 :]) for _, arguments in calls]
    for half in (0, 1):
        for index, parts in enumerate(halves):
            frames.append(_chunk({"tool_calls": [{"index": index, "function": {"arguments": parts[half]}}]}))
    if ends:
        frames.append(_chunk({}, finish=finish or ("tool_calls" if calls else "stop")))
        told = usage or {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        frames.append(_sse({"id": "c1", "object": "chat.completion.chunk", "choices": [], "usage": told}))
        frames.append(b"data: [DONE]\n\n")
    return frames


def anthropic_frames(
    pieces: Sequence[str] = (),
    calls: Sequence[tuple[str, str]] = (),
    *,
    finish: str = "",
    usage: Json | None = None,
    ends: bool = True,
    thinking: str = "",
) -> list[bytes]:
    """The events of a message: thinking with its signature, text in pieces, calls (name, arguments) in pieces."""
    told = {"input_tokens": 100, "output_tokens": 1, **(usage or {})}
    message = {"id": "m1", "type": "message", "role": "assistant", "content": [], "model": "m", "usage": told}
    frames = [_event("message_start", message={**message, "stop_reason": None, "stop_sequence": None})]
    blocks: list[tuple[Json, list[Json]]] = []
    if thinking:
        deltas = [{"type": "thinking_delta", "thinking": thinking}, {"type": "signature_delta", "signature": "sig+/=="}]
        blocks.append(({"type": "thinking", "thinking": "", "signature": ""}, deltas))
    if pieces:
        blocks.append(({"type": "text", "text": ""}, [{"type": "text_delta", "text": piece} for piece in pieces]))
    for index, (name, arguments) in enumerate(calls):
        half = len(arguments) // 2
        parts = [{"type": "input_json_delta", "partial_json": part} for part in (arguments[:half], arguments[half:])]
        blocks.append(({"type": "tool_use", "id": f"toolu_{index}x", "name": name, "input": {}}, parts))
    for index, (block, deltas) in enumerate(blocks):
        frames.append(_event("content_block_start", index=index, content_block=block))
        frames += [_event("content_block_delta", index=index, delta=delta) for delta in deltas]
        if ends:
            frames.append(_event("content_block_stop", index=index))
        frames.append(_event("ping"))
    if ends:
        stop = {"stop_reason": finish or ("tool_use" if calls else "end_turn"), "stop_sequence": None}
        frames.append(_event("message_delta", delta=stop, usage={"output_tokens": 10}))
        frames.append(_event("message_stop"))
    return frames


FRAMES = {"openai": openai_frames, "anthropic": anthropic_frames}


def _chunk(delta: Json, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return _sse({"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]})


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\n".encode() + _sse({"type": kind, **fields})


def _sse(value: Json) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
