"""Batched bidi streams: outboxes whose whole content goes in one frame, callers that re-send what was unanswered.

A frame costs the same whatever its size, so a sender collects what one turn of the event loop queues; never a timer.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextvars import ContextVar
from typing import Any, Final, Generic, Protocol, TypeVar

import grpc

from mainspring_kit import telemetry
from mainspring_kit.channel import Peer
from mainspring_kit.errors import MainspringError, Reason
from mainspring_kit.tasks import background, raise_if_cancelled

FRAME_ITEMS_MAX: Final = 512
FRAME_BYTES_MAX: Final = 1 << 20

_ADDRESS_REFRESH_SECONDS: Final = 1.0
_RECONNECT_SECONDS_MIN: Final = 0.05
_RECONNECT_SECONDS_MAX: Final = 1.0
# What grpc.aio raises besides RpcError when a call broke under a reader or writer.
BROKEN_CALL: Final = (asyncio.InvalidStateError, grpc.aio.UsageError, grpc.aio.InternalError)

# The task group of the streaming call under way; it ends with the call.
call_tasks: Final[ContextVar[asyncio.TaskGroup]] = ContextVar("mainspring_call_tasks")


class Sized(Protocol):
    """What goes through an outbox: a message that knows its size on the wire."""

    def ByteSize(self) -> int: ...


Item = TypeVar("Item", bound=Sized)
Request = TypeVar("Request")
Response = TypeVar("Response")


class Outbox(Generic[Item]):
    """A bounded queue of one sender; `take` gives all that is queued, up to a frame's caps."""

    def __init__(self, name: str, *, items_max: int = 65_536, bytes_max: int = 256 << 20) -> None:
        self._name = name
        self._items_max = items_max
        self._bytes_max = bytes_max
        self._items: deque[tuple[Item, int]] = deque()
        self._bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Item) -> None:
        """Queues an item; QUEUE_FULL at the bound. An item alone may be larger than the byte bound."""
        size = item.ByteSize()
        if len(self._items) >= self._items_max or (self._items and self._bytes + size > self._bytes_max):
            raise MainspringError(
                Reason.QUEUE_FULL,
                f"The queue {self._name} holds {len(self._items)} items and takes no more now: wait and try again.",
                queue=self._name,
                limit=self._items_max,
            )
        self._items.append((item, size))
        self._bytes += size
        self._wake()

    def close(self) -> None:
        """Lets `take` return an empty list once everything queued was taken."""
        self._closed = True
        self._wake()

    async def take(self) -> list[Item]:
        """Waits for items and returns a frame's worth; an empty list: closed and empty. One taker at a time."""
        if not self._items and not self._closed:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        frame: list[Item] = []
        frame_bytes = 0
        while self._items and len(frame) < FRAME_ITEMS_MAX:
            item, size = self._items[0]
            if frame and frame_bytes + size > FRAME_BYTES_MAX:
                break
            self._items.popleft()
            self._bytes -= size
            frame_bytes += size
            frame.append(item)
        return frame

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Replies(Generic[Item]):
    """The answers of one served stream: `expect` for each item that arrives, `put` for each answer."""

    def __init__(self, name: str, outstanding_max: int) -> None:
        self.outbox: Outbox[Item] = Outbox(name, items_max=outstanding_max)
        self._name = name
        self._outstanding = 0
        self._outstanding_max = outstanding_max
        self._ended = False

    def expect(self, count: int = 1) -> None:
        """Counts items that will be answered; QUEUE_FULL when more are under way, or not taken, than the credit."""
        self._outstanding += count
        if self._outstanding + len(self.outbox) > self._outstanding_max:
            raise MainspringError(
                Reason.QUEUE_FULL,
                f"{self._name} takes {self._outstanding_max} unanswered items on one stream: wait for answers first.",
                queue=self._name,
                limit=self._outstanding_max,
            )

    def put(self, answer: Item) -> None:
        """Queues the answer to one item."""
        self._outstanding -= 1
        self.outbox.put(answer)
        if self._ended and self._outstanding <= 0:
            self.outbox.close()

    def end(self) -> None:
        """The peer sends no more: the stream ends when all is answered."""
        self._ended = True
        if self._outstanding <= 0:
            self.outbox.close()


async def serve_batches(
    requests: AsyncIterator[Request],
    replies: Replies[Item],
    *,
    receive: Callable[[Request], None],
    frame: Callable[[list[Item]], Response],
) -> AsyncIterator[Response]:
    """Serves one batched bidi stream: hands every frame to `receive`, yields the answers batched.

    `receive` calls `replies.expect` and never waits. Ends when the peer has half-closed and all is answered. The reader
    runs in the call's own task group (`call_tasks`), which the interceptor opens and closes.
    """

    async def read() -> None:
        async for request in requests:
            receive(request)
        replies.end()

    call_tasks.get().create_task(read())
    while answers := await replies.outbox.take():
        yield frame(answers)


class _Item(Sized, Protocol):
    item_id: int


class _Answer(Protocol):
    @property
    def item_id(self) -> int: ...


Sent = TypeVar("Sent", bound=_Item)
Answer = TypeVar("Answer", bound=_Answer)

# A grpc.aio bidi call: generic over messages that only its opener knows, so Any.
BidiCall = grpc.aio.StreamStreamCall[Any, Any]


class _Link(Generic[Sent, Answer]):
    """The stream to one instance: what waits for an answer, in order, and what of it was not yet sent."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.instance_id = ""
        self.is_live = False
        self.waiting: dict[int, tuple[Sent, asyncio.Future[Answer]]] = {}
        self.unsent: deque[Sent] = deque()
        self.changed = asyncio.Event()

    def add(self, item: Sent, future: asyncio.Future[Answer]) -> None:
        self.waiting[item.item_id] = (item, future)
        self.unsent.append(item)
        self.changed.set()

    def resolve(self, answer: Answer) -> None:
        found = self.waiting.pop(answer.item_id, None)
        if found is not None and not found[1].done():
            found[1].set_result(answer)
        if self.unsent:
            self.changed.set()

    def rewind(self, lost: Callable[[Sent], Answer | None]) -> None:
        """Everything unanswered is to be sent again, in order; what nobody waits for any more is dropped."""
        unsent = {item.item_id for item in self.unsent}
        sent = [item for number, (item, _) in self.waiting.items() if number not in unsent]
        for answer in filter(None, map(lost, sent)):
            self.resolve(answer)
        self.waiting = {number: pair for number, pair in self.waiting.items() if not pair[1].cancelled()}
        self.unsent = deque(item for item, _ in self.waiting.values())
        self.changed.set()

    async def next_frame(self, credit: int) -> list[Sent]:
        """Waits until something may be sent and takes a frame of it."""
        while not self.unsent or len(self.waiting) - len(self.unsent) >= credit:
            self.changed.clear()
            await self.changed.wait()
        frame: list[Sent] = []
        room = min(FRAME_ITEMS_MAX, credit - (len(self.waiting) - len(self.unsent)))
        frame_bytes = 0
        while self.unsent and len(frame) < room:
            item = self.unsent[0]
            if item.item_id in self.waiting and self.waiting[item.item_id][1].cancelled():
                # Nobody waits for it any more: sent now it would only have its effect.
                del self.waiting[item.item_id]
                self.unsent.popleft()
                continue
            size = item.ByteSize()
            if frame and frame_bytes + size > FRAME_BYTES_MAX:
                break
            frame_bytes += size
            frame.append(self.unsent.popleft())
        return frame


class BatchPool(Generic[Sent, Answer]):
    """The caller's side of one batched bidi rpc: a stream to every live instance of the peer.

    Items are sent in the order of `post` on each stream. A stream that breaks is opened again, or its items move to
    another instance; either way everything unanswered is sent again in order, so receivers de-duplicate.
    """

    def __init__(
        self,
        peer: Peer,
        name: str,
        *,
        open_call: Callable[[grpc.aio.Channel], BidiCall],
        frame: Callable[[list[Sent]], object],
        unpack: Callable[[Any], tuple[Iterable[Answer], str]],
        lost: Callable[[Sent], Answer | None] = lambda _: None,
        credit: int = 4_096,
        queue_max: int = 65_536,
    ) -> None:
        """`unpack` gives a response's answers and the instance's name, if the response tells it (else empty).

        `lost` gives the answer to an item that was sent on a stream that broke and must not be sent again.
        """
        self._peer = peer
        self._name = name
        self._open_call = open_call
        self._frame = frame
        self._unpack = unpack
        self._lost = lost
        self._credit = credit
        self._queue_max = queue_max
        self._links: dict[str, _Link[Sent, Answer]] = {}
        self._homeless: list[tuple[Sent, asyncio.Future[Answer]]] = []
        self._last_item_id = 0

    @property
    def is_live(self) -> bool:
        """Whether any instance can be reached now."""
        return any(link.is_live for link in self._links.values())

    def post(self, item: Sent, *, instance_id: str = "", after: Sent | None = None) -> asyncio.Future[Answer]:
        """Queues an item, in order, for the named instance, else the least busy one.

        While `after` is unanswered the item goes behind it instead, wherever that has moved meanwhile.
        QUEUE_FULL at the bound. The future never fails by itself: whoever waits sets a deadline.
        """
        link = self._choose(instance_id, after.item_id if after is not None else 0)
        queued = len(link.waiting) if link is not None else len(self._homeless)
        if queued >= self._queue_max:
            raise MainspringError(
                Reason.QUEUE_FULL,
                f"{queued} items wait for {self._name}: wait and try again.",
                queue=self._name,
                limit=self._queue_max,
            )
        self._last_item_id += 1
        item.item_id = self._last_item_id
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        if link is None:
            self._homeless.append((item, future))
        else:
            link.add(item, future)
        return future

    def pick_instance(self, instance_id: str = "") -> str:
        """The instance that `post` would choose now, for callers whose items must stay together; empty: not known."""
        link = self._choose(instance_id)
        return link.instance_id if link is not None else ""

    async def run(self) -> None:
        """Keeps a stream to every address of the peer, as long as it is awaited."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                for address in await self._peer.addresses():
                    if address not in self._links:
                        link = self._links[address] = _Link(address)
                        self._rehouse()
                        tasks.create_task(self._keep(link))
                await asyncio.sleep(_ADDRESS_REFRESH_SECONDS)

    async def _keep(self, link: _Link[Sent, Answer]) -> None:
        """Opens the stream to one instance again and again until its address is no more."""
        delay = _RECONNECT_SECONDS_MIN
        while True:
            try:
                await self._converse(link)
            except (grpc.RpcError, *BROKEN_CALL) as error:
                _log_break(self._name, link.address, error=error)
            raise_if_cancelled()
            delay = _RECONNECT_SECONDS_MIN if link.is_live else min(delay * 2, _RECONNECT_SECONDS_MAX)
            link.is_live = False
            link.rewind(self._lost)
            self._move(link)
            if link.address not in await self._peer.addresses():
                del self._links[link.address]
                self._homeless.extend(link.waiting.values())
                self._rehouse()
                return
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))

    async def _converse(self, link: _Link[Sent, Answer]) -> None:
        call = self._open_call(self._peer.instance_channel(link.address))
        try:
            await call.wait_for_connection()
            async with background(self._write(link, call)):
                while (response := await call.read()) is not grpc.aio.EOF:
                    answers, instance_id = self._unpack(response)
                    if instance_id:
                        link.instance_id = instance_id
                    link.is_live = True
                    for answer in answers:
                        link.resolve(answer)
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group
        finally:
            call.cancel()

    async def _write(self, link: _Link[Sent, Answer], call: BidiCall) -> None:
        while True:
            await call.write(self._frame(await link.next_frame(self._credit)))

    def _choose(self, instance_id: str = "", after_id: int = 0) -> _Link[Sent, Answer] | None:
        links = list(self._links.values())
        if len(links) == 1:
            return links[0]
        for link in links:
            if after_id in link.waiting:
                return link
        named = [link for link in links if instance_id and link.instance_id == instance_id]
        fit = named or [link for link in links if link.is_live] or links
        return min(fit, key=lambda link: len(link.waiting), default=None)

    def _move(self, link: _Link[Sent, Answer]) -> None:
        """Hands what a broken stream left unanswered, in order, to a live instance, if there is one."""
        live = [other for other in self._links.values() if other.is_live]
        if not live:
            return
        target = min(live, key=lambda other: len(other.waiting))
        link.instance_id = ""
        for item, future in link.waiting.values():
            target.add(item, future)
        link.waiting, link.unsent = {}, deque()

    def _rehouse(self) -> None:
        """All go to one instance, so that they stay in order."""
        link = self._choose()
        if link is None:
            return
        homeless, self._homeless = self._homeless, []
        for item, future in homeless:
            if not future.cancelled():
                link.add(item, future)


def _log_break(name: str, address: str, *, error: Exception) -> None:
    """A peer that went away is an everyday matter; any other reason is somebody's fault and must be seen."""
    code = error.code().name if isinstance(error, grpc.aio.AioRpcError) else type(error).__name__
    log = telemetry.logger().debug if code in ("UNAVAILABLE", "CANCELLED") else telemetry.logger().warning
    log("stream_broken", stream=name, address=address, code=code, detail=str(error)[:300])
