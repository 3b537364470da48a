"""Who watches which run in this process, and the newest events of recent runs. Everything here happens at once."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from mainspring.v1 import events_pb2, state_pb2
from mainspring_kit import telemetry

from mainspring_state.core.append import TRANSITIONS
from mainspring_state.core.drafts import Drafts
from mainspring_state.core.feed import Feed

# Tenant and run.
Key = tuple[str, str]


class Watcher(Protocol):
    """What hears of a run's new events."""

    def deliver(self, key: Key, delivery: state_pb2.Delivery, *, is_end: bool) -> None:
        """Takes new events, in order and without gap. Never waits."""

    def show_text(self, key: Key) -> None:
        """There is more unfinished text of the run. Never waits."""


class Creator(Watcher, Protocol):
    """A follower that runs may be created for."""

    def join(self, key: Key, user_id: str) -> None:
        """Follows a run from its first event on; it was made in this very moment."""

    def catch_up(self, key: Key, user_id: str) -> None:
        """Follows a run that was made for it earlier."""


class Hub:
    """The feeds of runs: those that somebody watches, and a bounded cache of the others' newest events."""

    def __init__(self, *, runs_max: int, bytes_max: int, drafts: Drafts) -> None:
        self.drafts = drafts
        self._runs_max = runs_max
        self._bytes_max = bytes_max
        self._watched: dict[Key, Feed] = {}
        self._cached: OrderedDict[Key, Feed] = OrderedDict()
        self._watchers: dict[Key, dict[Watcher, None]] = {}
        self._bytes = 0
        self.creators: dict[str, Creator] = {}
        self.lagging: set[Key] = set()
        self.lag = asyncio.Event()

    def watch(self, key: Key, watcher: Watcher) -> Feed:
        """Delivers the run's events to the watcher from now on; where they begin is told by the feed."""
        feed = self._watched.get(key)
        if feed is None:
            feed = self._watched[key] = self._cached.pop(key) if key in self._cached else Feed()
            self._watchers[key] = {}
        self._watchers[key][watcher] = None
        return feed

    def unwatch(self, key: Key, watcher: Watcher) -> None:
        """Delivers nothing more of the run to the watcher."""
        watchers = self._watchers.get(key)
        if watchers is None:
            return
        watchers.pop(watcher, None)
        if not watchers:
            self._release(key)

    def watched(self) -> list[tuple[Key, Feed]]:
        """The runs that somebody watches and whose log is known up to some seq."""
        return [(key, feed) for key, feed in self._watched.items() if feed.is_known]

    def take_in(
        self, key: Key, user_id: str, *, events: Sequence[events_pb2.RunEvent], encoded: Sequence[bytes] | None = None
    ) -> state_pb2.Delivery | None:
        """New events of a run, in order: to its watchers and into the cache; what is known already is dropped.

        With `encoded` they were committed here and are kept even if nobody watches. Gives what was delivered, if
        anything was.
        """
        watchers = self._watchers.get(key)
        feed = self._watched.get(key) or self._cached.get(key)
        if key in self.drafts:
            for event in events:
                self.drafts.hear(key, event)
        if feed is not None and feed.misses(events[0].seq):
            if watchers:
                self.mark_lagging(key)
                return None
            self._forget(key)
            feed = None
        if feed is None:
            if encoded is None or not self._runs_max:
                return None
            feed = self._cached[key] = Feed()
        feed.user_id = user_id
        bytes_before = feed.tail_bytes
        known = feed.accept(events[0].seq, encoded or [event.SerializeToString() for event in events])
        self._bytes += feed.tail_bytes - bytes_before
        fresh = events[known:]
        for event in fresh:
            if event.HasField("agent_thinking"):
                feed.step = max(feed.step, event.agent_thinking.step)
        delivery = None
        if watchers and fresh:
            delivery = state_pb2.Delivery(run_id=key[1], tenant_id=key[0], user_id=user_id, events=fresh)
            self._deliver(key, delivery, watchers=watchers)
        elif not watchers:
            self._cached.move_to_end(key)
        self._trim(feed)
        return delivery

    def take_text(self, published: state_pb2.PublishedDelta) -> None:
        """Unfinished text of a run: into its draft, and to its watchers. What comes too late is dropped."""
        delta = published.delta
        key = (published.tenant_id, delta.run_id)
        feed = self._watched.get(key) or self._cached.get(key)
        if feed is not None and feed.user_id and feed.user_id != published.user_id:
            telemetry.logger().error("foreign_text_dropped", run_id=delta.run_id)
            return
        if feed is not None and delta.step <= feed.step:
            return
        if self.drafts.add(key, delta, user_id=published.user_id):
            for watcher in list(self._watchers.get(key, ())):
                watcher.show_text(key)

    def mark_lagging(self, key: Key) -> None:
        """Events of this run were missed here: they will be read from the log."""
        if key in self._watched:
            self.lagging.add(key)
            self.lag.set()

    def _deliver(self, key: Key, delivery: state_pb2.Delivery, *, watchers: dict[Watcher, None]) -> None:
        is_end = is_terminal(delivery.events[-1])
        for watcher in list(watchers):
            watcher.deliver(key, delivery, is_end=is_end)
        if is_end and key in self._watchers:
            self._release(key)

    def _release(self, key: Key) -> None:
        """Nobody watches the run any more: its feed is one of the cache."""
        self._watchers.pop(key, None)
        self.lagging.discard(key)
        feed = self._watched.pop(key)
        if feed.is_known and self._runs_max:
            self._cached[key] = feed
            self._trim(feed)
        else:
            self._bytes -= feed.tail_bytes

    def _forget(self, key: Key) -> None:
        feed = self._cached.pop(key, None)
        if feed is not None:
            self._bytes -= feed.tail_bytes

    def _trim(self, feed: Feed) -> None:
        while self._cached and (len(self._cached) > self._runs_max or self._bytes > self._bytes_max):
            self._forget(next(iter(self._cached)))
        if self._bytes > self._bytes_max:
            self._bytes -= feed.tail_bytes
            feed.shed()


class EndWaiter:
    """A watcher that only wants to know that the run has ended."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def deliver(self, key: Key, delivery: state_pb2.Delivery, *, is_end: bool) -> None:
        """Wakes who waits when the run has ended."""
        if is_end:
            self.wake()

    def show_text(self, key: Key) -> None:
        """Text is no end."""

    def wake(self) -> None:
        """Ends the wait, whatever the run does."""
        if not self.ended.done():
            self.ended.set_result(None)


def is_terminal(event: events_pb2.RunEvent) -> bool:
    """Whether the event is the last of its log."""
    transition = TRANSITIONS.get(event.WhichOneof("payload") or "")
    return transition is not None and transition.is_end
