"""A run's events as a text/event-stream: the same log, for clients without WebSockets."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from aiohttp import ClientConnectionResetError, hdrs, web
from mainspring_kit import telemetry
from mainspring_kit.errors import MainspringError, Reason
from mainspring_kit.identity import Principal, UserExecutionContext

from mainspring_gateway import metrics
from mainspring_gateway.core import queries
from mainspring_gateway.core.events import EncodedEvent, sse_block
from mainspring_gateway.core.follows import Follow
from mainspring_gateway.gateway import BEGUN, Gateway, slow_consumer

MEDIA_TYPE: Final = "text/event-stream"

_LAST_EVENT_ID: Final = "Last-Event-ID"
_RETRY_MS: Final = 1_000


def position(request: web.Request) -> int:
    """The seq to go on after: the browser's `Last-Event-ID` if it reconnects, else `after_seq`."""
    after_seq, _ = queries.read_events_range({name: request.query.getall(name) for name in request.query})
    last_id = request.headers.get(_LAST_EVENT_ID, "")
    return queries.whole_number(last_id, _LAST_EVENT_ID) if last_id else after_seq


async def stream_events(
    request: web.Request, gateway: Gateway, *, principal: Principal, context: UserExecutionContext
) -> web.StreamResponse:
    """Streams a run's events to its end. 204 when there is none left: a browser then does not come again."""
    gateway.refuse_when_draining()
    stream = EventStream(request, gateway, principal=principal)
    follow = Follow(stream, context, after_seq=position(request))
    gateway.connections.admit(stream, principal)
    try:
        await gateway.engine.replay(follow, context, found=lambda: None, pace=stream.pace)
        if follow.has_ended and not stream.response.prepared:
            return web.Response(status=204)
        await stream.live()
    except MainspringError as error:
        if not stream.response.prepared:
            raise
        stream.shut(error)
    except ClientConnectionResetError:
        telemetry.logger().debug("event_stream_lost", run_id=context.run_id)
    finally:
        gateway.engine.feeds.leave(follow)
        gateway.connections.leave(stream, principal)
    return stream.response


class EventStream:
    """One client of one run's events. What is shown queues until its own task has written it."""

    def __init__(self, request: web.Request, gateway: Gateway, *, principal: Principal) -> None:
        self.response = web.StreamResponse(headers={hdrs.CONTENT_TYPE: MEDIA_TYPE, "X-Accel-Buffering": "no"})
        self._request = request
        self._settings = gateway.settings
        self._principal = principal
        self._blocks: list[bytes] = []
        self._queued_bytes = 0
        self._changed = asyncio.Event()
        self._is_over = False

    def show(self, event: EncodedEvent) -> None:
        """Queues an event; a client that takes none while its queue fills is let go, and can resume."""
        if self._queued_bytes > self._settings.queue_bytes_max or len(self._blocks) > self._settings.queue_frames_max:
            self.shut(slow_consumer(self._settings.queue_bytes_max))
            if self._request.transport is not None:
                self._request.transport.abort()
            return
        block = sse_block(event)
        self._blocks.append(block)
        self._queued_bytes += len(block)
        self._changed.set()

    def show_text(self, follow: Follow) -> None:
        """Unfinished text is for sockets: an event stream is the log alone."""

    def branch(self, parent: Follow, run_id: str) -> None:
        """An event stream is one run's; its sub-runs have their own."""

    def end(self, follow: Follow, error: MainspringError | None) -> None:
        """Ends the stream after what is queued. After a failure the client comes again by itself."""
        self._is_over = True
        self._changed.set()

    def beat(self, monotonic_time: float, wall_time: float) -> None:
        """Ends the stream when the token has expired."""
        if self._principal.expire_time <= wall_time:
            self.shut(self._principal.expired())

    def shut(self, error: MainspringError) -> None:
        """Ends the stream; SSE has no words for why, so the log has them."""
        if error.rule is Reason.SLOW_CONSUMER:
            metrics.SLOW_CONSUMERS.inc()
        telemetry.logger().info("event_stream_shut", reason=error.reason_name)
        self._is_over = True
        self._changed.set()

    async def pace(self) -> None:
        """Writes what is queued and waits until the client has taken most of it. The first write opens the answer."""
        self._changed.clear()
        blocks, self._blocks, self._queued_bytes = self._blocks, [], 0
        if not blocks:
            return
        await self._open()
        await self.response.write(b"".join(blocks))

    async def live(self) -> None:
        """Writes events as they come, and a comment into each silence, until the stream is over."""
        await self._open()
        while True:
            await self.pace()
            if self._is_over and not self._blocks:
                break
            begin = time.monotonic()
            try:
                async with asyncio.timeout(self._settings.sse_heartbeat_seconds):
                    await self._changed.wait()
            except TimeoutError:
                silence_seconds = time.monotonic() - begin
                await self.response.write(b": %d s without an event\n\n" % silence_seconds)
        await self.response.write_eof()

    async def _open(self) -> None:
        if not self.response.prepared:
            await self.response.prepare(self._request)
            self._request[BEGUN] = self.response
            await self.response.write(b"retry: %d\n\n" % _RETRY_MS)
