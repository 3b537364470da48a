"""A WebSocket client for tests: keeps every frame in order, and never waits without a deadline."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

SUBPROTOCOL = "mainspring.v1.json"
FRAME_SECONDS = 20.0
TERMINAL_TYPES = frozenset({"agent_completed", "agent_failed", "agent_cancelled", "agent_timed_out"})

Frame = dict[str, Any]  # Any: a JSON object


class SocketClosedError(AssertionError):
    """The gateway closed the socket while the test waited for a frame."""

    def __init__(self, code: int | None, waiting_for: str) -> None:
        super().__init__(f"the socket was closed with {code} while waiting for {waiting_for}")
        self.code = code


class StreamClient:
    """One socket. Frames are read only while the test waits for one, so nothing runs behind its back."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self.frames: list[Frame] = []
        self.welcome: Frame = {}

    async def send(self, op: str, **fields: Any) -> str:
        """Sends a frame with an id of its own and returns the id."""
        frame_id = str(next(self._ids))
        await self._socket.send_str(json.dumps({"op": op, "id": frame_id, **fields}))
        return frame_id

    async def ask(self, op: str, **fields: Any) -> Frame:
        """Sends a frame and returns the one that answers it: ok, started, pong or error."""
        frame_id = await self.send(op, **fields)
        return await self.wait_for(
            lambda frame: frame.get("id") == frame_id and frame["op"] not in ("event", "delta"), f"an answer to {op}"
        )

    async def start(self, agent: str, input_value: object, **fields: Any) -> str:
        """Starts a run, which this socket then follows; returns its id."""
        answer = await self.ask("start", agent=agent, input=input_value, **fields)
        assert answer["op"] == "started", f"start was answered with {answer}"
        run_id: str = answer["run_id"]
        return run_id

    async def run(self, agent: str, input_value: object, **fields: Any) -> list[Frame]:
        """Starts a run and returns all its events once it has ended."""
        return await self.ended(await self.start(agent, input_value, **fields))

    async def follow(self, run_id: str, after_seq: int = 0) -> None:
        """Follows a run; its events come from `after_seq` + 1 on."""
        answer = await self.ask("follow", run_id=run_id, after_seq=after_seq)
        assert answer["op"] == "ok", f"follow was answered with {answer}"

    async def ended(self, run_id: str, seconds: float = FRAME_SECONDS) -> list[Frame]:
        """Waits for the run's terminal event and returns all its events so far, in order of arrival."""
        await self.wait_for(
            lambda frame: frame["op"] == "event" and frame["run_id"] == run_id and frame["type"] in TERMINAL_TYPES,
            f"the end of run {run_id}",
            seconds,
        )
        return self.events(run_id)

    async def until(self, run_id: str, event_type: str, seconds: float = FRAME_SECONDS) -> Frame:
        """Waits for the run's first event of a type."""
        return await self.wait_for(
            lambda frame: frame["op"] == "event" and frame["run_id"] == run_id and frame["type"] == event_type,
            f"{event_type} of run {run_id}",
            seconds,
        )

    def events(self, run_id: str = "") -> list[Frame]:
        """The event frames so far, of one run or of all."""
        return [frame for frame in self.frames if frame["op"] == "event" and run_id in ("", frame["run_id"])]

    async def wait_for(self, condition: Callable[[Frame], bool], what: str, seconds: float = FRAME_SECONDS) -> Frame:
        """The first frame, already here or still to come, that meets the condition."""
        for frame in self.frames:
            if condition(frame):
                return frame
        try:
            async with asyncio.timeout(seconds):
                while True:
                    frame = await self._receive(what)
                    if condition(frame):
                        return frame
        except TimeoutError as error:
            last = json.dumps(self.frames[-5:], indent=1)
            raise AssertionError(f"{what} did not come in {seconds} s; the last frames were {last}") from error

    async def closed(self, seconds: float = FRAME_SECONDS) -> int | None:
        """Reads to the end of the socket and returns its close code."""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    await self._receive("the socket's end")
        except SocketClosedError as ended:
            return ended.code

    async def close(self) -> None:
        """Closes the socket from this side."""
        await self._socket.close()

    async def _receive(self, what: str) -> Frame:
        message = await self._socket.receive()
        if message.type is aiohttp.WSMsgType.CLOSE:
            # What the gateway said; the library's own close_code is 1006 when the answer can't be sent any more.
            raise SocketClosedError(message.data, what)
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise SocketClosedError(self._socket.close_code, what)
        frame: Frame = json.loads(message.data)
        self.frames.append(frame)
        return frame


@asynccontextmanager
async def open_stream(gateway_url: str, token: str) -> AsyncIterator[StreamClient]:
    """Opens `/v1/stream` with a bearer token and waits for the welcome."""
    headers = {"Authorization": f"Bearer {token}"}
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(
            f"{gateway_url}/v1/stream", headers=headers, protocols=(SUBPROTOCOL,), max_msg_size=0
        ) as socket,
    ):
        client = StreamClient(socket)
        client.welcome = await client.wait_for(lambda frame: frame["op"] == "welcome", "the welcome")
        yield client


def types(events: Sequence[Frame]) -> list[str]:
    """The events' types in order."""
    return [event["type"] for event in events]


def check_log(events: Sequence[Frame]) -> None:
    """Fails unless the events are one run's whole log: begun once, gapless from 1, one terminal event, the last."""
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1)), [event["seq"] for event in events]
    assert len({event["run_id"] for event in events}) == 1
    kinds = types(events)
    assert kinds.count("agent_started") == 1 and kinds[0] == "agent_started", kinds
    assert [kind for kind in kinds if kind in TERMINAL_TYPES] == kinds[-1:], kinds
