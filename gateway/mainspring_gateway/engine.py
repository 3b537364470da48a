"""What runs at the gateway when nobody calls: the one Follow stream, replays, starts under way, the sockets' beat."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from mainspring.v1 import execution_pb2, state_pb2
from mainspring_kit import telemetry
from mainspring_kit.errors import MainspringError, Reason, Violation, from_status
from mainspring_kit.identity import UserExecutionContext, new_id
from mainspring_kit.streams import Outbox
from mainspring_kit.tasks import background, raise_if_cancelled

from mainspring_gateway.config import GatewaySettings
from mainspring_gateway.core.commands import Start
from mainspring_gateway.core.events import encode, is_terminal
from mainspring_gateway.core.feeds import Feeds, Order
from mainspring_gateway.core.follows import Follow
from mainspring_gateway.peers import Peers

StartFuture = asyncio.Future[execution_pb2.StartResult]

_RECONNECT_SECONDS_MIN: Final = 0.05
_RECONNECT_SECONDS_MAX: Final = 0.5
_BEAT_SECONDS: Final = 1.0
_ORDERS_MAX: Final = 1 << 20


class Engine:
    """Owns every task of the gateway, and what its connections share: the feeds and the drain."""

    def __init__(self, settings: GatewaySettings, peers: Peers) -> None:
        self.feeds = Feeds()
        self.draining = asyncio.Event()
        self._settings = settings
        self._peers = peers
        self._reads = asyncio.Semaphore(settings.reads_max)
        self._tasks: asyncio.TaskGroup | None = None

    @asynccontextmanager
    async def running(self, beat: Callable[[], None]) -> AsyncIterator[None]:
        """Runs the engine beside the block; `beat` is called once a second."""
        async with background(self._peers.starts.run(), self._follow(), self._beat(beat)) as tasks:
            self._tasks = tasks
            yield

    def readiness(self) -> dict[str, bool]:
        """What the gateway needs, and whether it is there now."""
        return {
            **self._peers.reachable(),
            "start_runs": self._peers.starts.is_live,
            "follow": self.feeds.is_attached,
            "serving": not self.draining.is_set(),
        }

    def spawn(self, coroutine: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Runs a coroutine on its own; a fault in it is logged and touches nothing else."""
        if self._tasks is None:
            raise RuntimeError("the engine is not running")
        return self._tasks.create_task(_contained(coroutine))

    def start_run(self, start: Start, context: UserExecutionContext, *, follow: Follow | None = None) -> StartFuture:
        """Sends a start; `follow` sees the run from its first event. The future's outcome is read by `started`.

        QUEUE_FULL at the bound. The future is cancelled when the start is not answered in time.
        """
        request = execution_pb2.StartRunRequest(
            agent=start.agent,
            alias=start.alias,
            version=start.version,
            input=start.input,
            session_id=start.session_id,
            idempotency_key=start.idempotency_key,
            priority=start.priority,
            start_time=start.start_time,
        )
        item = execution_pb2.StartItem(context=context.to_message(), start=request)
        if follow is not None:
            item.state_id, item.follower_id = self.feeds.state_id, self.feeds.follower_id
        future: StartFuture = self._peers.starts.post(item)
        if follow is not None:
            self.feeds.begin(follow)
        timer = asyncio.get_running_loop().call_later(self._settings.start_seconds, future.cancel)
        future.add_done_callback(partial(self._answered, run_id=context.run_id, timer=timer))
        return future

    async def replay(
        self,
        follow: Follow,
        context: UserExecutionContext,
        *,
        found: Callable[[], None],
        pace: Callable[[], Awaitable[None]],
    ) -> None:
        """Shows a follow the log after its seq, page by page at its watcher's pace, then joins it to the live feed.

        Subscribes first, reads the log, drops by seq: so nothing is missed and nothing comes twice. `found` is called
        once it is certain that the run is the user's, `pace` after each page. RUN_NOT_FOUND, or REQUEST_INVALID when
        the seq is not in the log.
        """
        is_found = False
        try:
            while not follow.is_over:
                self.feeds.hold(follow)
                # From the event before: it tells whether the log has ended there.
                after_seq = max(follow.sent_seq - 1, 0)
                async with self._reads:
                    page = await self._peers.read_events(context, run_id=follow.run_id, after_seq=after_seq)
                if not is_found:
                    is_found = True
                    _check_position(follow, page)
                    found()
                for event in page.events:
                    if event.seq > follow.sent_seq:
                        follow.replay(encode(event))
                if page.events and is_terminal(page.events[-1]):
                    follow.end(None)
                await pace()
                if follow.is_over or (follow.sent_seq >= page.last_seq and self.feeds.settle(follow)):
                    break
        except BaseException:
            self.feeds.leave(follow)
            raise
        if follow.is_over:
            self.feeds.leave(follow)

    def _answered(self, future: StartFuture, *, run_id: str, timer: asyncio.TimerHandle) -> None:
        timer.cancel()
        if not future.cancelled():
            result = future.result()
            if not result.status.code and result.run_id == run_id and not result.repeated_key:
                self.feeds.confirm(run_id, followed=result.followed)
                return
        self.feeds.abandon(run_id)

    async def _beat(self, beat: Callable[[], None]) -> None:
        foreign_count = 0
        while True:
            await asyncio.sleep(_BEAT_SECONDS)
            beat()
            self.feeds.retry()
            if self.feeds.foreign_count > foreign_count:
                telemetry.logger().error("foreign_events_dropped", count=self.feeds.foreign_count - foreign_count)
                foreign_count = self.feeds.foreign_count

    async def _follow(self) -> None:
        """Keeps one Follow stream open, to any one state instance; the next one when it breaks."""
        delay = _RECONNECT_SECONDS_MIN
        while True:
            addresses = await self._peers.state.addresses()
            random.shuffle(addresses)
            for address in addresses:
                if await self._follow_at(address):
                    delay = _RECONNECT_SECONDS_MIN
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(delay * 2, _RECONNECT_SECONDS_MAX)

    async def _follow_at(self, address: str) -> bool:
        """Follows at one instance until the stream ends; whether it was ever open."""
        outbox: Outbox[Order] = Outbox("follow", items_max=_ORDERS_MAX)
        follower_id = new_id()
        is_open = False

        def receive(response: state_pb2.FollowResponse) -> None:
            nonlocal is_open
            if not is_open:
                is_open = True
                self.feeds.attach(outbox.put, follower_id=follower_id, state_id=response.state_id)
                telemetry.logger().info("follow_opened", address=address, state_id=response.state_id)
            self.feeds.deliver(response.deliveries)

        code = "OK"
        try:
            await self._peers.follow(address, follower_id, outbox=outbox, receive=receive)
        except MainspringError as error:
            code = error.code.name
        finally:
            self.feeds.detach()
        raise_if_cancelled()
        telemetry.logger().log(logging.INFO if is_open else logging.DEBUG, "follow_closed", address=address, code=code)
        return is_open


def started(future: StartFuture) -> execution_pb2.StartResult:
    """The outcome of a start that is done, or the error that it ended with."""
    if future.cancelled():
        raise MainspringError(
            Reason.PEER_UNAVAILABLE,
            "The start was not answered in time; the run may exist: start again with the same idempotency key.",
            peer="execution",
        )
    result = future.result()
    if result.status.code:
        raise from_status(result.status)
    return result


def _check_position(follow: Follow, page: state_pb2.ReadEventsResponse) -> None:
    if follow.sent_seq > page.last_seq:
        raise MainspringError(
            Reason.REQUEST_INVALID,
            f"after_seq is {follow.sent_seq}, but the log of run {follow.run_id} ends at {page.last_seq}.",
            violations=[Violation("after_seq", f"must be at most {page.last_seq}")],
            field="after_seq",
        )


async def _contained(coroutine: Coroutine[object, object, None]) -> None:
    try:
        await coroutine
    except (
        Exception
    ) as error:  # the root of one connection's own work: its fault is ours to log, not the others' to share
        telemetry.logger().error("task_failed", exc_info=error)
