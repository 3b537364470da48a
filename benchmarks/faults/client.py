"""A user's client as a good one is: reconnects, follows on by seq, starts again under the same key, notices silence."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
from picows import WSError, WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from benchmarks.faults.runs import TERMINAL, Run, Seen

CONNECT_SECONDS: Final = 2.0
# As long as nothing comes: when a ping is sent, and when the gateway is given up.
SILENCE_SECONDS: Final = 1.0
DEAF_SECONDS: Final = 2.5
AGAIN_SECONDS: Final = (0.1, 0.3)
RETRYABLE: Final = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"})

_PING: Final = orjson.dumps({"op": "ping"})
_NOTES_MAX: Final = 20


@dataclass(slots=True)
class Ledger:
    """What all clients have noticed while it happened."""

    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def blame(self, count: str, text: str) -> None:
        """Counts a breach of the promises: gaps, doubled, mismatched, foreign or lost."""
        self.counts[count] += 1
        if len(self.notes) < _NOTES_MAX:
            self.notes.append(f"{count}: {text}")


@dataclass(frozen=True, slots=True)
class Opening:
    """When a socket was welcomed, and by which gateway."""

    time: float
    gateway: int


class _Socket(WSListener):
    """One connection. `next_seqs`: which event of each followed run has to come next on it."""

    def __init__(self, hear: Callable[[_Socket, dict[str, Any], int], None]) -> None:
        """Any: JSON."""
        self._hear = hear
        self._time = asyncio.get_running_loop().time
        self._transport: WSTransport | None = None
        self.next_seqs: dict[str, int] = {}
        # Starts that were sent again on it, and the runs that their first sending may have made: the second answer is
        # followed from the beginning.
        self.repeated: set[str] = set()
        self.suspects: set[str] = set()
        self.heard_time = self._time()
        self.welcome = asyncio.Event()
        self.closed = asyncio.Event()

    def on_ws_connected(self, transport: WSTransport) -> None:
        self._transport = transport

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self.closed.set()

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        self.heard_time = self._time()
        if frame.msg_type is WSMsgType.PING:
            transport.send_pong(frame.get_payload_as_bytes())
        elif frame.msg_type is WSMsgType.CLOSE:
            transport.disconnect()
        elif frame.msg_type is WSMsgType.TEXT and not self.closed.is_set():
            payload = frame.get_payload_as_bytes()
            self._hear(self, orjson.loads(payload), hash(payload))

    def send(self, payload: bytes) -> None:
        if self._transport is not None and not self.closed.is_set():
            self._transport.send(WSMsgType.TEXT, payload)

    def drop(self) -> None:
        """Lets the connection go without a word."""
        self.closed.set()
        if self._transport is not None:
            self._transport.disconnect(graceful=False)


class Client:
    """One user: the runs that are open, and the one socket over which they are started and followed."""

    def __init__(
        self,
        user: str,
        token: str,
        *,
        urls: list[str],
        chance: random.Random,
        ledger: Ledger,
        ended: Callable[[], None],
    ) -> None:
        """`ended` is called for each run that ended or was refused."""
        self.user = user
        self.open: dict[str, Run] = {}
        self.openings: list[Opening] = []
        # By run id: all that frames have told, also of runs whose start was not answered yet.
        self.logs: dict[str, Seen] = {}
        self._token = token
        self._urls = urls
        self._chance = chance
        self._ledger = ledger
        self._ended = ended
        self._socket: _Socket | None = None
        self._by_id: dict[str, Run] = {}
        self._loop = asyncio.get_running_loop()

    def start(self, run: Run) -> None:
        """Starts a run now, or as soon as there is a socket."""
        run.asked_time = self._loop.time()
        self.open[run.key] = run
        if self._socket is not None:
            self._socket.send(run.start)

    async def stay(self) -> None:
        """Keeps a socket open, as long as it is awaited."""
        gateway = self._chance.randrange(len(self._urls))
        while True:
            try:
                await self._converse(gateway)
            except (OSError, WSError):
                self._ledger.counts["connects_refused"] += 1
            self._socket = None
            gateway = (gateway + 1) % len(self._urls)
            await asyncio.sleep(self._chance.uniform(0.02, 0.2))

    async def _converse(self, gateway: int) -> None:
        """One connection, from its opening to its end or to where nothing more is heard."""
        headers = {"Authorization": f"Bearer {self._token}"}
        socket = _Socket(self._hear)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await ws_connect(lambda: socket, self._urls[gateway], extra_headers=headers, enable_auto_ping=False)
                await socket.welcome.wait()
            self.openings.append(Opening(self._loop.time(), gateway))
            self._socket = socket
            for run in self.open.values():
                self._take_up(run)
            await self._listen(socket)
        finally:
            socket.drop()

    async def _listen(self, socket: _Socket) -> None:
        while not socket.closed.is_set():
            try:
                async with asyncio.timeout(SILENCE_SECONDS / 2):
                    await socket.closed.wait()
            except TimeoutError:
                silence = self._loop.time() - socket.heard_time
                if silence >= DEAF_SECONDS:
                    self._ledger.counts["gateways_given_up"] += 1
                    return
                if silence >= SILENCE_SECONDS:
                    socket.send(_PING)

    def _take_up(self, run: Run) -> None:
        """Starts a run again that has no id yet, or follows it from what is known of it."""
        if self._socket is None or run.key not in self.open:
            return
        if not run.run_id:
            self._socket.send(run.start)
            return
        self._socket.next_seqs[run.run_id] = run.seen.last_seq + 1
        asked = {"op": "follow", "id": run.key, "run_id": run.run_id, "after_seq": run.seen.last_seq}
        self._socket.send(orjson.dumps(asked))

    def _hear(self, socket: _Socket, message: dict[str, Any], digest: int) -> None:
        """Takes one frame. Any: JSON."""
        operation = message["op"]
        if operation == "event":
            self._hear_event(socket, message, digest)
        elif operation == "started":
            self._hear_started(socket, message)
        elif operation == "error":
            self._hear_error(socket, message)
        elif operation == "welcome":
            socket.welcome.set()

    def _hear_event(self, socket: _Socket, message: dict[str, Any], digest: int) -> None:
        run_id, seq = message["run_id"], message["seq"]
        due = socket.next_seqs.get(run_id, 1)
        socket.next_seqs[run_id] = seq + 1
        if seq != due:
            blamed = "doubled" if seq < due else "gaps"
            self._ledger.blame(blamed, f"event {seq} of run {run_id} came where {due} was due")
        seen = self.logs.setdefault(run_id, Seen())
        if seq == seen.last_seq + 1:
            seen.digests.append(digest)
            seen.times.append(self._loop.time())
            seen.types.append(message["type"])
        elif seq <= seen.last_seq and seen.digests[seq - 1] != digest:
            self._ledger.blame("mismatched", f"event {seq} of run {run_id} came in two forms")
        if message["type"] in TERMINAL and (run := self._by_id.get(run_id)) is not None:
            self._close(run)

    def _hear_started(self, socket: _Socket, message: dict[str, Any]) -> None:
        run = self.open.get(message["id"])
        run_id = message["run_id"]
        if run is None or (run.run_id and run.run_id != run_id):
            self._ledger.blame("doubled", f"the start {message['id']} was answered with run {run_id} again")
            return
        if run.key in socket.repeated and run_id in socket.suspects:
            socket.next_seqs.pop(run_id, None)
        run.acknowledged_time = run.acknowledged_time or self._loop.time()
        run.run_id = run_id
        run.seen = self.logs.setdefault(run_id, run.seen)
        self._by_id[run_id] = run
        if run.seen.has_ended:
            self._close(run)

    def _hear_error(self, socket: _Socket, message: dict[str, Any]) -> None:
        run = self.open.get(message.get("id") or "")
        if run is None:
            return
        self._ledger.counts[f"refused {message['reason']}"] += 1
        if message["code"] in RETRYABLE:
            socket.repeated.add(run.key)
            socket.suspects |= socket.next_seqs.keys() - self._by_id.keys()
            seconds = self._chance.uniform(*AGAIN_SECONDS) + message.get("retry_after_ms", 0) / 1e3
            self._loop.call_later(seconds, self._take_up_on, socket, run)
        elif run.run_id:
            self._ledger.blame("lost", f"run {run.run_id} can't be followed any more: {message}")
            self._close(run)
        else:
            run.refusal = message["reason"]
            if not run.refused_at:
                self._ledger.blame("lost", f"the start {run.key} was refused for good: {message}")
            self._close(run)

    def _take_up_on(self, socket: _Socket, run: Run) -> None:
        """Unless a new socket has taken it up since."""
        if socket is self._socket:
            self._take_up(run)

    def _close(self, run: Run) -> None:
        if self.open.pop(run.key, None) is not None:
            self._ended()
