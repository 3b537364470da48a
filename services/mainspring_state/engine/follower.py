"""One Follow stream: its subscriptions, each replayed from the log and joined to what comes live."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Final

from mainspring.v1 import events_pb2, state_pb2, types_pb2
from mainspring_kit.errors import MainspringError, Reason, to_status
from mainspring_kit.identity import Caller, UserExecutionContext
from mainspring_kit.streams import Outbox, call_tasks

from mainspring_state.core.append import ENDED_STATES
from mainspring_state.core.feed import Feed
from mainspring_state.core.privacy import public
from mainspring_state.engine.hub import Hub, Key, is_terminal
from mainspring_state.engine.showing import Showing
from mainspring_state.store.reads import Reads
from mainspring_state.store.rows import to_event

PAGE_EVENTS_MAX: Final = 500
PAGE_BYTES_MAX: Final = 1 << 20
# Replays wait for the reader when they fill this part of the stream's bound: only what comes live can flood a stream.
REPLAY_PART: Final = 4
# Unfinished text waits when deliveries fill this part of the stream's bound.
TEXT_PART: Final = 2

# A user's own stream, which no gateway bounds: how many subscriptions it may have, and how many may begin at a time, so
# that thousands of them do not stand before everybody else's in the line for the database.
USER_SUBSCRIPTIONS_MAX: Final = 1_000
USER_BEGINNINGS_MAX: Final = 4

# The subscription that a create makes for its follower.
OF_CREATE: Final = 0


@dataclass(frozen=True, slots=True)
class FollowLimits:
    """What one stream may hold."""

    deliveries_max: int
    bytes_max: int
    subscriptions_max: int


@dataclass(frozen=True, slots=True)
class Sources:
    """Where events come from. `heal` brings a run's feed up to its log; `slots` bounds the replays that read."""

    hub: Hub
    reads: Reads
    heal: Callable[[Key, Feed], Awaitable[None]]
    slots: asyncio.Semaphore


class Follower:
    """The watcher behind one Follow stream."""

    def __init__(self, sources: Sources, limits: FollowLimits, *, caller: Caller, state_id: str) -> None:
        self._sources = sources
        self._limits = limits
        self._caller = caller
        is_service = caller.principal.is_service
        maximum = limits.subscriptions_max
        self._subscriptions_max = maximum if is_service else min(maximum, USER_SUBSCRIPTIONS_MAX)
        self._beginnings = asyncio.Semaphore(maximum if is_service else USER_BEGINNINGS_MAX)
        self._state_id = state_id
        self._outbox: Outbox[state_pb2.Delivery] = Outbox(
            "follow", items_max=limits.deliveries_max, bytes_max=limits.bytes_max
        )
        self._text = Showing(sources.hub.drafts)
        self._taken = asyncio.Event()
        self._replay_bytes = 0
        self._tasks: asyncio.TaskGroup | None = None
        self._name = ""
        self._keys: dict[int, Key] = {}
        self._created: dict[str, Key] = {}
        self._replaying: dict[Key, set[int]] = {}
        self._live: dict[Key, set[int]] = {}
        self._is_half_closed = False
        self._failure: MainspringError | None = None

    async def follow(self, requests: AsyncIterator[state_pb2.FollowRequest]) -> AsyncIterator[state_pb2.FollowResponse]:
        """Serves the stream. It ends when its caller has half-closed and every subscription is over."""
        self._tasks = call_tasks.get()
        self._tasks.create_task(self._read(requests))
        try:
            yield state_pb2.FollowResponse(state_id=self._state_id)
            while deliveries := await self._outbox.take():
                self._replay_bytes -= sum(
                    delivery.ByteSize() for delivery in deliveries if delivery.subscription_id and delivery.events
                )
                self._taken.set()
                for key in self._text.fill(deliveries):
                    self.show_text(key)
                yield state_pb2.FollowResponse(deliveries=deliveries)
            if self._failure is not None:
                raise self._failure
        finally:
            self._leave()

    def drain(self) -> None:
        """Ends the stream, after what is queued: its caller follows on elsewhere."""
        self._failure = MainspringError(
            Reason.DRAINING, "This state process is stopping: follow again after the last seq.", peer=self._state_id
        )
        self._outbox.close()

    def deliver(self, key: Key, delivery: state_pb2.Delivery, *, is_end: bool) -> None:
        """Queues new events for the run's live subscriptions here; at the stream's bound the stream breaks."""
        if key not in self._live:
            return
        if not self._caller.principal.is_service:
            delivery = state_pb2.Delivery(
                run_id=delivery.run_id,
                tenant_id=delivery.tenant_id,
                user_id=delivery.user_id,
                events=public(delivery.events),
            )
        owed_text = self._text.disown(key)
        self._put(delivery)
        if is_end:
            self._text.forget(key)
            for subscription_id in self._live.pop(key):
                self._drop(subscription_id, key)
            self._end_if_done()
        elif owed_text:
            self.show_text(key)

    def show_text(self, key: Key) -> None:
        """Queues what is new of the run's unfinished text, while there is room that events do not need."""
        if key not in self._live or len(self._outbox) >= self._limits.deliveries_max // TEXT_PART:
            return
        if (delivery := self._text.owe(key)) is not None:
            self._put(delivery)

    def join(self, key: Key, user_id: str) -> None:
        """Follows a run from its first event on; it was made in this very moment."""
        feed = self._sources.hub.watch(key, self)
        feed.user_id = user_id
        feed.settle(0)
        self._created[key[1]] = key
        self._live.setdefault(key, set()).add(OF_CREATE)

    def catch_up(self, key: Key, user_id: str) -> None:
        """Follows a run that was made for it earlier, unless it does already."""
        if self._tasks is None or key[1] in self._created:
            return
        self._created[key[1]] = key
        user = UserExecutionContext(tenant_id=key[0], user_id=user_id)
        self._begin(state_pb2.Subscribe(subscription_id=OF_CREATE, run_id=key[1]), user)

    async def _read(self, requests: AsyncIterator[state_pb2.FollowRequest]) -> None:
        async for request in requests:
            if request.follower_id and not self._name:
                self._introduce(request.follower_id)
            for unsubscribe in request.unsubscribe:
                self._unsubscribe(unsubscribe)
            for subscribe in request.subscribe:
                self._subscribe(subscribe)
        self._is_half_closed = True
        self._end_if_done()

    def _introduce(self, follower_id: str) -> None:
        if not self._caller.principal.is_service:
            raise MainspringError(
                Reason.ROLE_REQUIRED,
                "Only a service has a follower_id: subscribe to runs by their ids.",
                method="Follow",
                role="service",
            )
        self._name = follower_id
        self._sources.hub.creators[follower_id] = self

    def _subscribe(self, subscribe: state_pb2.Subscribe) -> None:
        try:
            user = self._user_of(subscribe)
            if subscribe.subscription_id == OF_CREATE or subscribe.subscription_id in self._keys:
                raise MainspringError(
                    Reason.REQUEST_INVALID,
                    f"The subscription id {subscribe.subscription_id} is 0 or in use: choose another.",
                    field="subscription_id",
                )
            if len(self._keys) >= self._subscriptions_max:
                raise MainspringError(
                    Reason.QUEUE_FULL,
                    f"One stream takes {self._subscriptions_max} subscriptions: end some or open another.",
                    queue="subscriptions",
                    limit=self._subscriptions_max,
                )
        except MainspringError as error:
            self._refuse(subscribe, error)
            return
        self._keys[subscribe.subscription_id] = (user.tenant_id, subscribe.run_id.lower())
        self._begin(subscribe, user)

    def _user_of(self, subscribe: state_pb2.Subscribe) -> UserExecutionContext:
        """As whom: what a service says, and nobody but itself for a user."""
        own = self._caller.context
        if subscribe.HasField("context"):
            named = UserExecutionContext.from_message(subscribe.context)
            if self._caller.principal.is_service or (
                own is not None and (named.tenant_id, named.user_id) == (own.tenant_id, own.user_id)
            ):
                return named
        elif own is not None:
            return own
        raise MainspringError(
            Reason.CONTEXT_INVALID,
            "A service names the user of each subscription, a user names nobody else: correct the context.",
            field="subscribe.context",
            value=subscribe.context.user_id,
        )

    def _begin(self, subscribe: state_pb2.Subscribe, user: UserExecutionContext) -> None:
        key = (user.tenant_id, subscribe.run_id.lower())
        self._replaying.setdefault(key, set()).add(subscribe.subscription_id)
        self._spawn(self._serve(subscribe, key, user=user))

    def _spawn(self, serving: Coroutine[object, object, None]) -> None:
        """In the call's own group, which takes nothing more when the call is just ending: then nobody listens.

        The committer may be who asks, and serves all others too: it must not suffer for that.
        """
        assert self._tasks is not None, "subscriptions come by the stream"
        try:
            self._tasks.create_task(serving)
        except RuntimeError:
            serving.close()

    async def _serve(self, subscribe: state_pb2.Subscribe, key: Key, *, user: UserExecutionContext) -> None:
        """Replays a subscription and leaves it live, or over."""
        try:
            async with self._beginnings:
                is_over = await self._replay(subscribe, key, user=user)
        except MainspringError as error:
            self._refuse(subscribe, error)
            is_over = True
        subscription_id = subscribe.subscription_id
        replaying = self._replaying.get(key, set())
        was_wanted = subscription_id in replaying
        replaying.discard(subscription_id)
        if not replaying:
            self._replaying.pop(key, None)
        if was_wanted and not is_over:
            self._live.setdefault(key, set()).add(subscription_id)
        else:
            self._drop(subscription_id, key)
        self._unwatch_if_idle(key)
        self._end_if_done()

    async def _replay(self, subscribe: state_pb2.Subscribe, key: Key, *, user: UserExecutionContext) -> bool:
        """Sends the log up to where live events go on, then caught_up; says whether the run has ended by then.

        Whoever awaits this must set the subscription live at once, without waiting for anything.
        """
        feed = self._sources.hub.watch(key, self)
        run = await self._look_up(subscribe.run_id, feed, key=key, user=user)
        number, position, is_ended = subscribe.subscription_id, subscribe.after_seq, False
        while position < (head := feed.last_seq):
            if number not in self._replaying.get(key, ()):
                return True
            if self._replay_bytes > self._limits.bytes_max // REPLAY_PART:
                self._taken.clear()
                await self._taken.wait()
                continue
            page = feed.since(position) or await self._read_page(user, key[1], after_seq=position)
            events = [to_event(event) for event in page[: head - position]]
            if not self._caller.principal.is_service:
                events = public(events)
            delivery = _delivery(run, number, events=events)
            if number != OF_CREATE:
                self._replay_bytes += delivery.ByteSize()
            self._put(delivery)
            position += len(events)
            is_ended = is_terminal(events[-1])
        if number != OF_CREATE:
            self._put(_delivery(run, number, caught_up_seq=head))
        if is_ended or (run.state in ENDED_STATES and head >= run.last_seq):
            return True
        text = self._text.so_far(key, is_first=key not in self._live)
        if text is not None:
            self._put(_delivery(run, number, deltas=[text]))
        return False

    async def _look_up(self, run_id: str, feed: Feed, *, key: Key, user: UserExecutionContext) -> types_pb2.Run:
        """The run as the user may see it; its feed is not behind it afterwards."""
        async with self._sources.slots:
            run = await self._sources.reads.get_run(user, key[1])
            if run is None:
                raise MainspringError(
                    Reason.RUN_NOT_FOUND, f"There is no run {run_id!r}: check the id.", run_id=run_id[:128]
                )
            feed.user_id = run.user_id
            # From here on a gap is seen, even one before what comes first.
            feed.settle(run.last_seq)
            if feed.last_seq < run.last_seq:
                await self._sources.heal(key, feed)
        return run

    async def _read_page(self, user: UserExecutionContext, run_id: str, *, after_seq: int) -> list[bytes]:
        async with self._sources.slots:
            return await self._sources.reads.read_events(
                user,
                run_id,
                after_seq=after_seq,
                item_max=PAGE_EVENTS_MAX,
                byte_max=min(PAGE_BYTES_MAX, self._limits.bytes_max // REPLAY_PART),
            )

    def _unsubscribe(self, unsubscribe: state_pb2.Unsubscribe) -> None:
        subscription_id = unsubscribe.subscription_id
        if subscription_id == OF_CREATE:
            key = self._created.get(unsubscribe.run_id.lower())
        else:
            key = self._keys.get(subscription_id)
        if key is None:
            return
        self._drop(subscription_id, key)
        for subscriptions in (self._replaying, self._live):
            if key in subscriptions:
                subscriptions[key].discard(subscription_id)
                if not subscriptions[key]:
                    del subscriptions[key]
        self._unwatch_if_idle(key)
        self._end_if_done()

    def _drop(self, subscription_id: int, key: Key) -> None:
        if subscription_id == OF_CREATE:
            self._created.pop(key[1], None)
        else:
            self._keys.pop(subscription_id, None)

    def _refuse(self, subscribe: state_pb2.Subscribe, error: MainspringError) -> None:
        self._put(
            state_pb2.Delivery(
                run_id=subscribe.run_id, subscription_id=subscribe.subscription_id, status=to_status(error)
            )
        )

    def _put(self, delivery: state_pb2.Delivery) -> None:
        try:
            self._outbox.put(delivery)
        except MainspringError as error:
            self._break(error)

    def _break(self, cause: MainspringError) -> None:
        """The reader is too slow: the whole stream fails, even while a frame waits for the reader to take it."""
        if self._failure is not None or self._tasks is None:
            return
        self._failure = MainspringError(
            Reason.SLOW_CONSUMER,
            f"{cause.message} Follow again after the last seq seen.",
            limit=self._limits.deliveries_max,
        )
        self._leave()
        self._spawn(_fail(self._failure))

    def _end_if_done(self) -> None:
        if self._is_half_closed and not self._replaying and not self._live:
            self._outbox.close()

    def _unwatch_if_idle(self, key: Key) -> None:
        if key not in self._live and key not in self._replaying:
            self._text.forget(key)
            self._sources.hub.unwatch(key, self)

    def _leave(self) -> None:
        """Watches nothing any more."""
        if self._name and self._sources.hub.creators.get(self._name) is self:
            del self._sources.hub.creators[self._name]
        for key in {*self._live, *self._replaying}:
            self._sources.hub.unwatch(key, self)
        self._live.clear()
        self._replaying.clear()


def _delivery(
    run: types_pb2.Run,
    subscription_id: int,
    *,
    events: Sequence[events_pb2.RunEvent] = (),
    caught_up_seq: int | None = None,
    deltas: Sequence[events_pb2.TextDelta] = (),
) -> state_pb2.Delivery:
    return state_pb2.Delivery(
        run_id=run.run_id,
        tenant_id=run.tenant_id,
        user_id=run.user_id,
        subscription_id=subscription_id,
        events=events,
        caught_up_seq=caught_up_seq,
        deltas=deltas,
    )


async def _fail(error: MainspringError) -> None:
    raise error
