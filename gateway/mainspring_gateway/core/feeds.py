"""The runs that this gateway follows at a state process: every event once, in order, to whom it belongs. Does no I/O.

A feed is one run as it arrives. Events that come again are dropped by their seq; one that is missing makes the feed
subscribe again after the last seq it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from mainspring.v1 import events_pb2, identity_pb2, state_pb2
from mainspring_kit.errors import MainspringError, Reason, from_status

from mainspring_gateway.core.drafts import Draft
from mainspring_gateway.core.events import encode
from mainspring_gateway.core.follows import Follow, RunOwner

# Unfinished text of all feeds together; beyond, the feed whose text would grow shows no more of its step.
_DRAFT_BYTES_MAX: Final = 64 << 20

# What a subscription may be refused with for reasons that pass.
_PASSING_CODES: Final = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "ABORTED"})

Order = state_pb2.Subscribe | state_pb2.Unsubscribe


def combine(orders: Iterable[Order]) -> state_pb2.FollowRequest:
    """Orders as one frame. A frame has no order within, so a subscription that is ended in it is not made at all."""
    subscribes: dict[int, state_pb2.Subscribe] = {}
    unsubscribes = []
    for order in orders:
        if isinstance(order, state_pb2.Subscribe):
            subscribes[order.subscription_id] = order
        elif subscribes.pop(order.subscription_id, None) is None:
            unsubscribes.append(order)
    return state_pb2.FollowRequest(subscribe=subscribes.values(), unsubscribe=unsubscribes)


class _Feed:
    """One run as it arrives. While it has a `starter`, the start subscribes it; `subscription_id` 0 stands for that."""

    __slots__ = (
        "draft",
        "follower_id",
        "follows",
        "last_seq",
        "missed_seq",
        "run_id",
        "starter",
        "step",
        "subscription_id",
        "tenant_id",
        "user_id",
    )

    def __init__(self, run: RunOwner, *, last_seq: int, follower_id: str) -> None:
        self.run_id = run.run_id
        self.tenant_id = run.tenant_id
        self.user_id = run.user_id
        self.last_seq = last_seq
        self.follower_id = follower_id
        self.follows: dict[Follow, None] = {}
        self.starter: Follow | None = None
        self.subscription_id = 0
        self.draft: Draft | None = None
        # The last model step whose end was seen.
        self.step = 0
        # The highest seq seen beyond a hole while the feed subscribes again; 0: there is no hole.
        self.missed_seq = 0


class Feeds:
    """All feeds of this process over its one Follow stream. `put` sends an order on the stream that is attached."""

    def __init__(self) -> None:
        self._feeds: dict[str, _Feed] = {}
        self._put: Callable[[Order], None] | None = None
        self._last_subscription_id = 0
        self._broken: dict[str, _Feed] = {}
        self.follower_id = ""
        self.state_id = ""
        self.foreign_count = 0
        self.gap_count = 0
        self._draft_bytes = 0

    def __len__(self) -> int:
        return len(self._feeds)

    @property
    def is_attached(self) -> bool:
        """Whether a state process is followed now."""
        return self._put is not None

    def attach(self, put: Callable[[Order], None], *, follower_id: str, state_id: str) -> None:
        """A new Follow stream is open: every feed subscribes on it from where it stands."""
        self._put, self.follower_id, self.state_id = put, follower_id, state_id
        for feed in self._feeds.values():
            if feed.starter is None:
                self._subscribe(feed)

    def detach(self) -> None:
        """The Follow stream broke; feeds wait for the next one."""
        self._put, self.follower_id, self.state_id = None, "", ""

    def begin(self, follow: Follow) -> None:
        """A run is about to be started with this process's follower, and watched from its first event."""
        feed = _Feed(follow, last_seq=0, follower_id=self.follower_id)
        feed.starter = follow
        feed.follows[follow] = None
        self._feeds[follow.run_id] = feed

    def confirm(self, run_id: str, *, followed: bool) -> None:
        """The run that `begin` named is durable, and subscribed by its start if `followed`."""
        feed = self._feeds.get(run_id)
        if feed is None or feed.starter is None:
            return
        feed.starter = None
        if not feed.follows:
            self._drop(feed)
        elif not followed or feed.follower_id != self.follower_id or feed.missed_seq:
            self._subscribe(feed)

    def abandon(self, run_id: str) -> None:
        """The run that `begin` named was not started, as far as is known, or is another: forgets its follow silently.

        Others may follow that run nevertheless: it may be there although the start's answer is not.
        """
        feed = self._feeds.get(run_id)
        if feed is None or feed.starter is None:
            return
        feed.follows.pop(feed.starter, None)
        self.confirm(run_id, followed=False)

    def hold(self, follow: Follow) -> None:
        """Before the log is read for a follow: keeps what comes live meanwhile."""
        follow.hold()
        feed = self._feeds.get(follow.run_id)
        if feed is not None and _is_owner(feed, follow):
            feed.follows[follow] = None

    def settle(self, follow: Follow) -> bool:
        """After the log was read to its end: follows on live. False: there is more in the log; hold and read again."""
        follow.release()
        if follow.is_over:
            return True
        feed = self._feeds.get(follow.run_id)
        if feed is None:
            feed = self._feeds[follow.run_id] = _Feed(follow, last_seq=follow.sent_seq, follower_id=self.follower_id)
            feed.step = follow.step
            feed.follows[follow] = None
            self._subscribe(feed)
            return True
        if not _is_owner(feed, follow):
            self.foreign_count += 1
            follow.end(_not_found(follow.run_id))
            return True
        if follow not in feed.follows or follow.sent_seq < feed.last_seq:
            return False
        if feed.draft is not None:
            follow.show_text(feed.draft)
        return True

    def leave(self, follow: Follow) -> None:
        """The watcher wants to see no more of the run."""
        follow.is_over = True
        feed = self._feeds.get(follow.run_id)
        if feed is None or follow not in feed.follows:
            return
        del feed.follows[follow]
        if not feed.follows and feed.starter is None:
            self._drop(feed)

    def deliver(self, deliveries: Iterable[state_pb2.Delivery]) -> None:
        """Takes what state sent. Events of another tenant or user than the feed's are dropped and counted."""
        for delivery in deliveries:
            feed = self._feeds.get(delivery.run_id)
            if feed is None:
                continue
            if (delivery.events or delivery.deltas) and not _is_owner(feed, delivery):
                self.foreign_count += 1
                continue
            for event in delivery.events:
                self._take(feed, event)
            for delta in delivery.deltas:
                self._take_text(feed, delta)
            if delivery.subscription_id == feed.subscription_id:
                if delivery.status.code:
                    self._break(feed, from_status(delivery.status))
                elif delivery.HasField("caught_up_seq"):
                    self._mend(feed)

    def retry(self) -> None:
        """Subscribes again what state could not serve for the moment; to be called at intervals."""
        broken, self._broken = self._broken, {}
        for feed in broken.values():
            if self._feeds.get(feed.run_id) is feed:
                self._subscribe(feed)

    def _take(self, feed: _Feed, event: events_pb2.RunEvent) -> None:
        seq = event.seq
        if seq <= feed.last_seq:
            return
        if seq > feed.last_seq + 1:
            self.gap_count += 1
            is_known = feed.missed_seq > 0
            feed.missed_seq = max(feed.missed_seq, seq)
            if not is_known and feed.starter is None:
                self._subscribe(feed, replaces=True)
            return
        try:
            encoded = encode(event)
        except MainspringError as error:
            self._fail(feed, error)
            return
        feed.last_seq = seq
        feed.step = encoded.step or feed.step
        if feed.draft is not None and (encoded.ends_text or feed.draft.step <= feed.step):
            self._end_text(feed)
        for follow in tuple(feed.follows):
            follow.show(encoded)
        if encoded.is_terminal:
            self._feeds.pop(feed.run_id, None)

    def _take_text(self, feed: _Feed, delta: events_pb2.TextDelta) -> None:
        """Unfinished text: what comes after its step's end, or without what is before it, is of no use."""
        if delta.step <= feed.step:
            return
        if not delta.offset:
            self._end_text(feed)
            feed.draft = Draft(feed.run_id, delta.step)
        draft = feed.draft
        if draft is None or draft.step != delta.step or delta.offset > draft.length:
            return
        size_bytes = draft.size_bytes
        draft.add(delta.text[draft.length - delta.offset :])
        self._draft_bytes += draft.size_bytes - size_bytes
        if self._draft_bytes > _DRAFT_BYTES_MAX:
            self._end_text(feed)
            return
        for follow in tuple(feed.follows):
            follow.show_text(draft)

    def _end_text(self, feed: _Feed) -> None:
        if feed.draft is not None:
            self._draft_bytes -= feed.draft.size_bytes
            feed.draft.end()
            feed.draft = None

    def _mend(self, feed: _Feed) -> None:
        """A subscription has caught up: if a hole is left, subscribes once more."""
        missed_seq, feed.missed_seq = feed.missed_seq, 0
        if missed_seq > feed.last_seq:
            self._subscribe(feed, replaces=True)

    def _break(self, feed: _Feed, error: MainspringError) -> None:
        """A subscription was refused: for good, or for the moment."""
        if error.code.name in _PASSING_CODES:
            self._broken[feed.run_id] = feed
        else:
            self._fail(feed, error)

    def _fail(self, feed: _Feed, error: MainspringError) -> None:
        self._end_text(feed)
        self._feeds.pop(feed.run_id, None)
        for follow in tuple(feed.follows):
            follow.end(error)

    def _subscribe(self, feed: _Feed, *, replaces: bool = False) -> None:
        former_id = feed.subscription_id
        feed.follower_id = self.follower_id
        self._last_subscription_id += 1
        feed.subscription_id = self._last_subscription_id
        if self._put is None:
            return
        if replaces:
            self._put(state_pb2.Unsubscribe(subscription_id=former_id, run_id=feed.run_id))
        owner = identity_pb2.UserExecutionContext(tenant_id=feed.tenant_id, user_id=feed.user_id, run_id=feed.run_id)
        self._put(
            state_pb2.Subscribe(
                subscription_id=feed.subscription_id, context=owner, run_id=feed.run_id, after_seq=feed.last_seq
            )
        )

    def _drop(self, feed: _Feed) -> None:
        self._end_text(feed)
        del self._feeds[feed.run_id]
        if self._put is not None:
            self._put(state_pb2.Unsubscribe(subscription_id=feed.subscription_id, run_id=feed.run_id))


def _is_owner(feed: _Feed, owner: RunOwner) -> bool:
    return feed.tenant_id == owner.tenant_id and feed.user_id == owner.user_id


def _not_found(run_id: str) -> MainspringError:
    return MainspringError(
        Reason.RUN_NOT_FOUND,
        f"No run {run_id} is visible to you: check the id, and whose token you use.",
        run_id=run_id,
    )
