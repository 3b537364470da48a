"""The frames on their way to WebSocket clients: one write per client and loop turn, bounded in bytes and in frames."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from aiohttp.abc import AbstractStreamWriter

# Unfinished text waits, and grows together, while more than this waits to be passed on to the client.
_TEXT_WAITS_BYTES: Final = 64 << 10
# So much text goes with one flush.
_TEXT_FLUSH_BYTES: Final = 256 << 10
_TEXT_RETRY_SECONDS: Final = 0.05


class TextSource(Protocol):
    """What has unfinished text for the client, in the moment when it is asked."""

    def take_text(self) -> bytes:
        """The next frame; empty when there is none."""


class Flusher:
    """Flushes, at the end of a turn of the loop, every client that something was queued for in it."""

    def __init__(self) -> None:
        self._unflushed: list[Outgoing] = []

    def wake(self, outgoing: Outgoing) -> None:
        """Has the client flushed at the end of this turn. To be called once per flush."""
        if not self._unflushed:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unflushed.append(outgoing)

    def _flush(self) -> None:
        unflushed, self._unflushed = self._unflushed, []
        for outgoing in unflushed:
            outgoing.flush()


class Outgoing:
    """The frames to one client, written whole to the transport that aiohttp writes its close frame to: order is kept.

    What waits is what the transport has not passed on yet. Over a bound, what is queued is dropped, nothing more is
    taken, and `on_slow` is called once: the client is to be told and let go.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        writer: AbstractStreamWriter,
        *,
        flusher: Flusher,
        bytes_max: int,
        frames_max: int,
        on_slow: Callable[[], None],
    ) -> None:
        self._transport = transport
        self._writer = writer
        self._flusher = flusher
        self._bytes_max = bytes_max
        self._frames_max = frames_max
        self._on_slow = on_slow
        self._queued: list[bytes] = []
        self._texts: dict[TextSource, None] = {}
        self._retry: asyncio.TimerHandle | None = None
        # Of each write not passed on yet: where it ends in the stream, and how many frames it holds.
        self._waiting: deque[tuple[int, int]] = deque()
        self._waiting_frames = 0
        self._written_bytes = 0
        self._is_stopped = False

    def send(self, frame: bytes) -> None:
        """Queues a frame for the end of this turn of the loop."""
        if self._is_stopped:
            return
        if not self._queued:
            self._flusher.wake(self)
        self._queued.append(frame)

    def offer(self, source: TextSource) -> None:
        """Has the source's text written behind what is queued, all that it has by then; later if the client is slow."""
        if self._is_stopped or self._retry is not None:
            self._texts[source] = None
            return
        if not self._queued and not self._texts:
            self._flusher.wake(self)
        self._texts[source] = None

    def flush(self) -> None:
        """Writes all that is queued, at once."""
        frames, self._queued = self._queued, []
        if self._texts:
            frames += self._take_texts()
        if not frames or self._is_stopped or self._transport.is_closing():
            return
        waiting_bytes = self._transport.get_write_buffer_size()
        self._forget_passed(self._written_bytes - waiting_bytes)
        if waiting_bytes > self._bytes_max or self._waiting_frames > self._frames_max:
            self._is_stopped = True
            self._on_slow()
            return
        data = frames[0] if len(frames) == 1 else b"".join(frames)
        self._written_bytes += len(data)
        self._waiting.append((self._written_bytes, len(frames)))
        self._waiting_frames += len(frames)
        self._transport.write(data)

    async def pace(self) -> None:
        """Writes all that is queued and waits until the client has taken most of it."""
        self.flush()
        await self._writer.drain()

    def stop(self, last_frame: bytes) -> None:
        """Writes what is queued, then a last frame, and takes no more."""
        self.flush()
        self._is_stopped = True
        if last_frame and not self._transport.is_closing():
            self._transport.write(last_frame)

    def _take_texts(self) -> list[bytes]:
        """Frames of unfinished text, as many as a client that keeps up may be sent at once."""
        frames: list[bytes] = []
        if self._is_stopped or self._transport.is_closing():
            self._texts.clear()
            return frames
        room = _TEXT_FLUSH_BYTES if self._transport.get_write_buffer_size() <= _TEXT_WAITS_BYTES else 0
        while self._texts and room > 0:
            source = next(iter(self._texts))
            if frame := source.take_text():
                frames.append(frame)
                room -= len(frame)
            else:
                del self._texts[source]
        if self._texts and self._retry is None:
            self._retry = asyncio.get_running_loop().call_later(_TEXT_RETRY_SECONDS, self._try_again)
        return frames

    def _try_again(self) -> None:
        self._retry = None
        self.flush()

    def _forget_passed(self, passed_bytes: int) -> None:
        waiting = self._waiting
        while waiting and waiting[0][0] <= passed_bytes:
            self._waiting_frames -= waiting.popleft()[1]
