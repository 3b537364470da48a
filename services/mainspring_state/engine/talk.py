"""What state processes tell each other on Redis, and how what was missed is read from the log. Nobody waits for it."""

from __future__ import annotations

import asyncio
import struct
import time
from collections import deque
from typing import Final, Protocol

from google.protobuf.message import DecodeError
from mainspring.v1 import state_pb2
from mainspring_kit import telemetry
from mainspring_kit.errors import MainspringError

from mainspring_state.core import hearing
from mainspring_state.core.feed import Feed
from mainspring_state.core.hearing import Hearing, Publication
from mainspring_state.engine.hub import Hub, Key
from mainspring_state.engine.presence import Presence
from mainspring_state.store.leases import Leases
from mainspring_state.store.rows import to_event
from mainspring_state.store.wire import UNREACHABLE, Wire

QUEUED_MAX: Final = 4_096
QUEUED_BYTES_MAX: Final = 64 << 20
HEAL_PAGE_EVENTS: Final = 1_000
HEAL_PAGE_BYTES: Final = 4 << 20
HEAL_RUNS: Final = 5_000
RECENT_SECONDS: Final = 5.0
FORGET_SECONDS: Final = 60.0


class Listener(Protocol):
    """Who is told what other processes have for this one's executors."""

    def hear_input(self, executor_id: str, run_input: state_pb2.RunInput) -> None:
        """An input of a run that the executor holds."""

    def kick(self) -> None:
        """Some run became claimable."""


class Talk:
    """Publishes this process's commits when somebody listens, hears the others', and heals what went missing."""

    def __init__(self, wire: Wire, hub: Hub, *, presence: Presence, leases: Leases, state_id: str) -> None:
        self._wire = wire
        self._hub = hub
        self._presence = presence
        self._leases = leases
        self._state_id = state_id
        self._hearing = Hearing()
        self._number = 0
        self._queue: deque[bytes] = deque()
        self._queue_bytes = 0
        self._queued = asyncio.Event()
        self._missed = asyncio.Event()
        self.listener: Listener | None = None

    async def run(self) -> None:
        """Goes on as long as it is awaited."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send())
            tasks.create_task(self._beat())
            tasks.create_task(self._listen())
            tasks.create_task(self._heal_missed())
            tasks.create_task(self._heal_lagging())

    def is_heard(self) -> bool:
        """Whether another process listens, as far as is known."""
        return bool(self._presence.peers) or self._hearing.recent(
            now_seconds=time.monotonic(), within_seconds=RECENT_SECONDS
        )

    def publish_deliveries(self, deliveries: list[state_pb2.Delivery]) -> None:
        """Tells other processes of a commit; its number goes up even when there is nobody to hear it."""
        self._number += 1
        if self.is_heard():
            frame = state_pb2.FollowResponse(deliveries=deliveries).SerializeToString()
            self._put(hearing.FRAME, frame)

    def publish_input(self, executor_id: str, run_input: state_pb2.RunInput) -> None:
        """Tells the process to which the run's holder beats."""
        if self.is_heard():
            self._put(hearing.INPUT, hearing.pack_input(executor_id, run_input.SerializeToString()))

    def publish_ready(self) -> None:
        """Tells other processes that a run became claimable."""
        if self.is_heard():
            self._put(hearing.READY, b"")

    def publish_text(self, request: state_pb2.PublishDeltasRequest) -> None:
        """Tells other processes of unfinished text, while what must be told leaves room."""
        if self.is_heard() and len(self._queue) < QUEUED_MAX // 2 and self._queue_bytes < QUEUED_BYTES_MAX // 2:
            self._put(hearing.TEXT, request.SerializeToString())

    async def heal(self, key: Key, feed: Feed) -> None:
        """Brings a feed up to its log, as long as somebody watches it."""
        last_seq = None
        while feed.last_seq != last_seq:
            last_seq = feed.last_seq
            events = await self._leases.read_log(
                key, after_seq=last_seq, item_max=HEAL_PAGE_EVENTS, byte_max=HEAL_PAGE_BYTES
            )
            if events:
                self._hub.take_in(key, feed.user_id, events=[to_event(event) for event in events], encoded=events)

    def _put(self, kind: bytes, body: bytes) -> None:
        message = hearing.pack(Publication(self._state_id, kind, self._number, body))
        if len(self._queue) >= QUEUED_MAX or self._queue_bytes + len(message) > QUEUED_BYTES_MAX:
            self._drop_queue()
        self._queue.append(message)
        self._queue_bytes += len(message)
        self._queued.set()

    def _drop_queue(self) -> None:
        """Redis is away or slow. The gap in the numbers makes the others read the log."""
        if self._queue:
            telemetry.logger().warning("publications_dropped", count=len(self._queue))
        self._queue.clear()
        self._queue_bytes = 0

    async def _send(self) -> None:
        while True:
            self._queued.clear()
            if not self._queue:
                await self._queued.wait()
            messages = list(self._queue)
            self._queue.clear()
            self._queue_bytes = 0
            try:
                await self._wire.publish(messages)
            except UNREACHABLE as error:
                telemetry.logger().debug("redis_unreachable", detail=str(error)[:200])
                await asyncio.sleep(hearing.BEAT_SECONDS)

    async def _beat(self) -> None:
        while True:
            if not self._queue:
                self._put(hearing.BEAT, b"")
            await asyncio.sleep(hearing.BEAT_SECONDS)

    async def _listen(self) -> None:
        while True:
            try:
                async for message in self._wire.hear():
                    self._hear_one(message)
            except UNREACHABLE as error:
                telemetry.logger().warning("redis_unreachable", detail=str(error)[:200])
            await asyncio.sleep(hearing.BEAT_SECONDS)

    def _hear_one(self, message: bytes) -> None:
        """What cannot be read, of another release or of nobody we know, counts as missed: the log has it."""
        try:
            self._hear(message)
        except (DecodeError, struct.error) as error:
            telemetry.logger().warning("publication_unreadable", detail=str(error)[:200])
            self._missed.set()

    def _hear(self, message: bytes) -> None:
        publication = hearing.unpack(message)
        if publication is None or publication.state_id == self._state_id:
            return
        if self._hearing.hear(publication, now_seconds=time.monotonic()):
            self._missed.set()
        if publication.kind == hearing.FRAME:
            for delivery in state_pb2.FollowResponse.FromString(publication.body).deliveries:
                key = (delivery.tenant_id, delivery.run_id)
                if delivery.events:
                    self._hub.take_in(key, delivery.user_id, events=delivery.events)
                else:
                    self._hub.mark_lagging(key)
        elif publication.kind == hearing.TEXT:
            for published in state_pb2.PublishDeltasRequest.FromString(publication.body).deltas:
                self._hub.take_text(published)
        elif self.listener is not None and publication.kind == hearing.INPUT:
            executor_id, run_input = hearing.unpack_input(publication.body)
            self.listener.hear_input(executor_id, state_pb2.RunInput.FromString(run_input))
        elif self.listener is not None and publication.kind == hearing.READY:
            self.listener.kick()

    async def _heal_missed(self) -> None:
        """After a gap at once, and on a tick as long as a living process is not heard: any run may lag then."""
        while True:
            try:
                async with asyncio.timeout(hearing.BEAT_SECONDS):
                    await self._missed.wait()
            except TimeoutError:
                now = time.monotonic()
                self._hearing.forget(now_seconds=now, after_seconds=FORGET_SECONDS)
                if self._hearing.is_complete(self._presence.peers, now_seconds=now):
                    continue
            self._missed.clear()
            for key, _ in self._hub.watched():
                self._hub.mark_lagging(key)

    async def _heal_lagging(self) -> None:
        while True:
            await self._hub.lag.wait()
            self._hub.lag.clear()
            keys = self._hub.lagging.copy()
            self._hub.lagging.clear()
            healed = await self._heal_all([(key, feed) for key, feed in self._hub.watched() if key in keys])
            if not healed:
                self._hub.lagging |= keys
                self._hub.lag.set()
                await asyncio.sleep(hearing.BEAT_SECONDS)

    async def _heal_all(self, feeds: list[tuple[Key, Feed]]) -> bool:
        """One read of last seqs for many runs, then the logs of those that went on. False: the database is away."""
        try:
            for start in range(0, len(feeds), HEAL_RUNS):
                page = feeds[start : start + HEAL_RUNS]
                last_seqs = await self._leases.last_seqs([key for key, _ in page])
                for key, feed in page:
                    if last_seqs.get(key, 0) > feed.last_seq:
                        await self.heal(key, feed)
        except MainspringError as error:
            telemetry.logger().debug("healing_delayed", detail=str(error)[:200])
            return False
        return True
