"""A load generator whose starts keep to a timetable, however long the runs take: what it sent when, what came when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from benchmarks.sockets import TERMINAL, read_message

# Any in this module: frames are JSON.


class Record:
    """What one slice has seen. Times are the machine's clock, the one that PostgreSQL reads."""

    def __init__(self, events: Mapping[str, int]) -> None:
        """`events`: how many a run of each agent has."""
        self.sent: dict[str, float] = {}
        self.started: dict[str, str] = {}
        self.arrivals: dict[str, list[float]] = {}
        self.gaps: list[float] = []
        self.lateness: list[float] = []
        self.faults: list[str] = []
        self.ended = 0
        self._events = events
        self._call_ends: dict[str, float] = {}
        self._changed = asyncio.Event()

    def first_events(self) -> list[float]:
        """From each start sent to its run's first event."""
        return [
            self.arrivals[run_id][0] - self.sent[start]
            for start, run_id in self.started.items()
            if run_id in self.arrivals
        ]

    async def wait_ended(self, count: int) -> None:
        """Returns when so many runs have ended or were refused."""
        while self.ended < count:
            self._changed.clear()
            await self._changed.wait()

    def take_event(self, message: Mapping[str, Any], now: float) -> None:
        """An event frame came."""
        run_id, kind = message["run_id"], message["type"]
        arrivals = self.arrivals.setdefault(run_id, [])
        arrivals.append(now)
        if message["seq"] != len(arrivals):
            self.faults.append(f"seq {message['seq']} came as frame {len(arrivals)} of its run")
        if kind == "tool_completed" and "begin" in message["data"].get("result", ()):
            self._take_call(run_id, message["data"]["result"])
        if kind in TERMINAL:
            if kind != "agent_completed" or len(arrivals) != self._events[message["agent"]]:
                self.faults.append(f"a run of {message['agent']} ended with {kind} as event {len(arrivals)}")
            self.end_one()

    def end_one(self) -> None:
        """A run ended, or its start was refused."""
        self.ended += 1
        self._changed.set()

    def _take_call(self, run_id: str, result: Mapping[str, float]) -> None:
        before = self._call_ends.get(run_id)
        if before is not None:
            self.gaps.append(result["begin"] - before)
        self._call_ends[run_id] = result["end"]


class PacedSocket(WSListener):
    """One socket with any number of runs under way."""

    def __init__(self) -> None:
        self._transport: WSTransport | None = None
        self._record = Record({})
        self.welcome = asyncio.get_running_loop().create_future()

    def on_ws_connected(self, transport: WSTransport) -> None:
        self._transport = transport

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self._record.faults.append("the socket was closed")

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        now = time.time()
        message = read_message(transport, frame)
        operation = message.get("op")
        if operation == "event":
            self._record.take_event(message, now)
        elif operation == "started":
            self._record.started[message["id"]] = message["run_id"]
        elif operation == "error":
            self._record.faults.append(f"{message['reason']}: {message['message']}")
            self._record.end_one()
        elif operation == "welcome":
            self.welcome.set_result(None)

    def start(self, record: Record, frame: Mapping[str, Any]) -> None:
        """Sends a start whose run counts into the record."""
        assert self._transport is not None
        self._record = record
        text = orjson.dumps(frame)
        record.sent[frame["id"]] = time.time()
        self._transport.send(WSMsgType.TEXT, text)


async def connect_paced(gateway: str, token: str) -> PacedSocket:
    """An authenticated socket."""
    _, listener = await ws_connect(
        PacedSocket,
        gateway.replace("http://", "ws://") + "/v1/stream",
        extra_headers={"Authorization": f"Bearer {token}"},
        enable_auto_ping=False,
    )
    assert isinstance(listener, PacedSocket)
    async with asyncio.timeout(10):
        await listener.welcome
    return listener


async def pace(
    sockets: Sequence[PacedSocket], record: Record, starts: Sequence[Mapping[str, Any]], *, rate: float
) -> float:
    """Sends the starts, so many a second, to the sockets in turn; gives the time of the first."""
    begin = time.time()
    for number, start in enumerate(starts):
        due = begin + number / rate
        if (early := due - time.time()) > 0:
            await asyncio.sleep(early)
        record.lateness.append(time.time() - due)
        sockets[number % len(sockets)].start(record, {**start, "id": str(number)})
    return begin
