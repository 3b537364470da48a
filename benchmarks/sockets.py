"""A load generator's WebSocket: starts a run, waits for its end, checks its log, and starts the next."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

TERMINAL: Final = frozenset({"agent_completed", "agent_failed", "agent_cancelled", "agent_timed_out"})


@dataclass(slots=True)
class Tally:
    """What a slice has seen. `durations` in seconds, from `start` sent to `agent_completed` received."""

    durations: list[float] = field(default_factory=list)
    first_events: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def read_message(transport: WSTransport, frame: WSFrame) -> dict[str, Any]:
    """What a text frame says (Any: JSON); of any other frame nothing. A ping is answered."""
    if frame.msg_type is WSMsgType.TEXT:
        message: dict[str, Any] = orjson.loads(frame.get_payload_as_memoryview())
        return message
    if frame.msg_type is WSMsgType.PING:
        transport.send_pong(frame.get_payload_as_bytes())
    return {}


class RunLoop(WSListener):
    """One socket, back to back: the next `start` goes out when the last run's terminal event is in."""

    def __init__(self, frame: bytes, events: int) -> None:
        self._frame = frame
        self._events = events
        self._transport: WSTransport | None = None
        self._sent = 0.0
        self._last_seq = 0
        self._tally = Tally()
        self._is_ending = False
        self.welcome = asyncio.get_running_loop().create_future()
        self.idle = asyncio.Event()
        self.idle.set()

    def on_ws_connected(self, transport: WSTransport) -> None:
        self._transport = transport

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self._fault("the socket was closed")
        self.idle.set()

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        message = read_message(transport, frame)
        operation = message.get("op")
        if operation == "event":
            self._on_event(message)
        elif operation == "error":
            self._fault(f"{message['reason']}: {message['message']}")
            self._start_next()
        elif operation == "welcome":
            self.welcome.set_result(None)

    def begin(self, tally: Tally) -> None:
        """Counts into this tally from now on, and runs until `end`."""
        self._tally = tally
        self._is_ending = False
        if self.idle.is_set():
            self._start_next()

    def end(self) -> None:
        """Starts nothing more; `idle` is set when the run under way has ended, which still counts."""
        self._is_ending = True

    def close(self) -> None:
        """Closes the socket."""
        if self._transport is not None:
            self._transport.disconnect()

    def _on_event(self, message: dict[str, object]) -> None:
        now = time.perf_counter()
        seq = message["seq"]
        if seq != self._last_seq + 1:
            self._fault(f"seq {seq} came after {self._last_seq}")
        self._last_seq = int(str(seq))
        if seq == 1:
            self._tally.first_events.append(now - self._sent)
        if message["type"] not in TERMINAL:
            return
        if message["type"] != "agent_completed" or seq != self._events:
            self._fault(f"the run ended with {message['type']} as event {seq}")
        else:
            self._tally.durations.append(now - self._sent)
        self._start_next()

    def _start_next(self) -> None:
        self._last_seq = 0
        if self._is_ending or self._transport is None:
            self.idle.set()
            return
        self.idle.clear()
        self._sent = time.perf_counter()
        self._transport.send(WSMsgType.TEXT, self._frame)

    def _fault(self, text: str) -> None:
        self._tally.faults.append(text)


async def connect(url: str, token: str, start: Mapping[str, object], events: int) -> RunLoop:
    """An authenticated socket that will send `start` again and again, each run having `events` events."""
    _, listener = await ws_connect(
        lambda: RunLoop(orjson.dumps(start), events),
        url,
        extra_headers={"Authorization": f"Bearer {token}"},
        enable_auto_ping=False,
    )
    assert isinstance(listener, RunLoop)
    async with asyncio.timeout(10):
        await listener.welcome
    return listener
