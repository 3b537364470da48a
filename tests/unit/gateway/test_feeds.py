"""Every watcher sees every event once, in order, and only what is its user's, whatever state sends and when."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mainspring.v1 import events_pb2, state_pb2
from mainspring_gateway.core.events import EncodedEvent, encode
from mainspring_gateway.core.feeds import Feeds, Order, combine
from mainspring_gateway.core.follows import Follow
from mainspring_kit.errors import MainspringError, Reason, to_status

pytestmark = pytest.mark.unit

LENGTH = 8


@dataclass(frozen=True, slots=True)
class Run:
    """A run and whose it is."""

    run_id: str = "r"
    tenant_id: str = "acme"
    user_id: str = "ann"


class Recorded:
    """A watcher that keeps what it is shown."""

    def __init__(self) -> None:
        self.seqs: list[int] = []
        self.ends: list[MainspringError | None] = []
        self.texts: list[tuple[int, int, str]] = []
        self.branches: list[tuple[str, str]] = []

    def show(self, event: EncodedEvent) -> None:
        self.seqs.append(event.seq)

    def show_text(self, follow: Follow) -> None:
        while frame := follow.take_text():
            delta = orjson.loads(frame[frame.index(b"{") :])
            self.texts.append((delta["step"], delta["offset"], delta["text"]))

    def branch(self, parent: Follow, run_id: str) -> None:
        self.branches.append((parent.run_id, run_id))

    def end(self, follow: Follow, error: MainspringError | None) -> None:
        self.ends.append(error)


def event(seq: int) -> events_pb2.RunEvent:
    """The event of that seq in a log of LENGTH events."""
    if seq == LENGTH:
        return events_pb2.RunEvent(run_id="r", seq=seq, agent_completed=events_pb2.AgentCompleted())
    return events_pb2.RunEvent(run_id="r", seq=seq, agent_thinking=events_pb2.AgentThinking(step=seq))


def delivery(
    seqs: Iterable[int], *, run: Run | None = None, subscription_id: int = 0, caught_up: bool = False
) -> state_pb2.Delivery:
    run = run or Run()
    found = state_pb2.Delivery(
        run_id=run.run_id,
        tenant_id=run.tenant_id,
        user_id=run.user_id,
        subscription_id=subscription_id,
        events=[event(seq) for seq in seqs],
    )
    if caught_up:
        found.caught_up_seq = max(seqs, default=0)
    return found


class Stream:
    """Feeds over a Follow stream whose orders are kept."""

    def __init__(self) -> None:
        self.feeds = Feeds()
        self.orders: list[Order] = []
        self.attach("follower")

    def attach(self, follower_id: str) -> None:
        self.orders = []
        self.feeds.attach(self.orders.append, follower_id=follower_id, state_id="state")

    def deliver(self, *deliveries: state_pb2.Delivery) -> None:
        self.feeds.deliver(deliveries)

    def follow(self, after_seq: int, log: Sequence[int] = ()) -> tuple[Follow, Recorded]:
        """A watcher that has read the log's events and follows on."""
        watcher = Recorded()
        follow = Follow(watcher, Run(), after_seq=after_seq)
        self.feeds.hold(follow)
        for seq in log:
            follow.replay(encode(event(seq)))
        assert self.feeds.settle(follow)
        return follow, watcher

    @property
    def subscribes(self) -> list[state_pb2.Subscribe]:
        return [order for order in self.orders if isinstance(order, state_pb2.Subscribe)]

    @property
    def unsubscribes(self) -> list[state_pb2.Unsubscribe]:
        return [order for order in self.orders if isinstance(order, state_pb2.Unsubscribe)]


def test_a_started_run_is_shown_without_an_order() -> None:
    stream, watcher = Stream(), Recorded()
    stream.feeds.begin(Follow(watcher, Run()))
    stream.deliver(delivery([1, 2]))
    stream.feeds.confirm("r", followed=True)
    stream.deliver(delivery(range(3, LENGTH + 1)))
    assert watcher.seqs == list(range(1, LENGTH + 1))
    assert watcher.ends == [None]
    assert stream.orders == []
    assert len(stream.feeds) == 0


def test_a_started_run_is_subscribed_where_the_start_could_not() -> None:
    stream, watcher = Stream(), Recorded()
    stream.feeds.begin(Follow(watcher, Run()))
    stream.feeds.confirm("r", followed=False)
    assert [(order.run_id, order.after_seq) for order in stream.subscribes] == [("r", 0)]
    assert (stream.subscribes[0].context.tenant_id, stream.subscribes[0].context.user_id) == ("acme", "ann")


def test_a_start_that_began_on_an_earlier_stream_is_subscribed_on_the_new_one() -> None:
    stream, watcher = Stream(), Recorded()
    stream.feeds.begin(Follow(watcher, Run()))
    stream.deliver(delivery([1]))
    stream.feeds.detach()
    stream.attach("another")
    assert stream.subscribes == []
    stream.feeds.confirm("r", followed=True)
    assert [order.after_seq for order in stream.subscribes] == [1]


def test_a_start_that_failed_leaves_nothing() -> None:
    stream, watcher = Stream(), Recorded()
    stream.feeds.begin(Follow(watcher, Run()))
    stream.feeds.abandon("r")
    stream.deliver(delivery([1]))
    assert (watcher.seqs, watcher.ends, len(stream.feeds)) == ([], [], 0)


def test_a_start_without_an_answer_leaves_the_run_to_those_who_found_it() -> None:
    stream, starter = Stream(), Recorded()
    stream.feeds.begin(Follow(starter, Run()))
    stream.deliver(delivery([1]))
    _, other = stream.follow(0, log=[1])
    stream.feeds.abandon("r")
    assert [order.after_seq for order in stream.subscribes] == [1]
    stream.deliver(delivery(range(2, LENGTH + 1)))
    assert (starter.seqs, starter.ends) == ([1], [])
    assert (other.seqs, other.ends) == (list(range(1, LENGTH + 1)), [None])


def test_a_started_run_that_nobody_watches_any_more_is_unsubscribed() -> None:
    stream = Stream()
    follow = Follow(Recorded(), Run())
    stream.feeds.begin(follow)
    stream.feeds.leave(follow)
    assert stream.orders == []
    stream.feeds.confirm("r", followed=True)
    assert [(order.subscription_id, order.run_id) for order in stream.unsubscribes] == [(0, "r")]
    assert len(stream.feeds) == 0


def test_events_that_come_again_are_dropped() -> None:
    stream = Stream()
    _, watcher = stream.follow(0, [1, 2])
    stream.deliver(delivery([1, 2, 3]), delivery([2, 3, 4], subscription_id=stream.subscribes[0].subscription_id))
    stream.deliver(delivery([1]), delivery([5]))
    assert watcher.seqs == [1, 2, 3, 4, 5]
    assert (len(stream.subscribes), stream.feeds.gap_count) == (1, 0)


def test_events_of_others_are_dropped_and_counted() -> None:
    stream = Stream()
    _, watcher = stream.follow(0)
    stream.deliver(
        delivery([1], run=Run(tenant_id="other")),
        delivery([1], run=Run(user_id="bob")),
        delivery([1], run=Run("other")),
    )
    assert watcher.seqs == []
    assert stream.feeds.foreign_count == 2


def test_a_hole_is_healed_by_subscribing_after_the_last_seq() -> None:
    stream = Stream()
    _, watcher = stream.follow(0)
    stream.deliver(delivery([1]), delivery([4]), delivery([5]))
    assert watcher.seqs == [1]
    first, second = stream.subscribes
    assert second.after_seq == 1
    assert [order.subscription_id for order in stream.unsubscribes] == [first.subscription_id]
    stream.deliver(delivery([2, 3, 4, 5], subscription_id=second.subscription_id, caught_up=True), delivery([6]))
    assert watcher.seqs == [1, 2, 3, 4, 5, 6]
    assert len(stream.subscribes) == 2
    assert stream.feeds.gap_count == 2


def test_a_hole_that_is_left_is_healed_again() -> None:
    stream = Stream()
    _, watcher = stream.follow(0)
    stream.deliver(delivery([1]), delivery([5]))
    stream.deliver(delivery([2, 3], subscription_id=stream.subscribes[-1].subscription_id, caught_up=True))
    assert [order.after_seq for order in stream.subscribes] == [0, 1, 3]
    stream.deliver(delivery([4, 5], subscription_id=stream.subscribes[-1].subscription_id, caught_up=True))
    assert watcher.seqs == [1, 2, 3, 4, 5]


def test_a_new_stream_takes_every_feed_up_where_it_stands() -> None:
    stream = Stream()
    _, watcher = stream.follow(0, [1, 2])
    stream.deliver(delivery([3]))
    stream.feeds.detach()
    assert not stream.feeds.is_attached
    stream.attach("another")
    assert [order.after_seq for order in stream.subscribes] == [3]
    assert stream.unsubscribes == []
    stream.deliver(delivery(range(4, LENGTH + 1), subscription_id=stream.subscribes[0].subscription_id))
    assert watcher.seqs == list(range(1, LENGTH + 1))


def test_a_follow_without_a_stream_waits_for_one() -> None:
    stream = Stream()
    stream.feeds.detach()
    _, watcher = stream.follow(2)
    stream.attach("another")
    assert [order.after_seq for order in stream.subscribes] == [2]
    stream.deliver(delivery([3]))
    assert watcher.seqs == [3]


def test_two_watchers_share_a_subscription_and_the_last_one_ends_it() -> None:
    stream = Stream()
    first, first_watcher = stream.follow(0)
    second, second_watcher = stream.follow(2)
    stream.deliver(delivery([1, 2, 3]))
    assert (first_watcher.seqs, second_watcher.seqs) == ([1, 2, 3], [3])
    assert len(stream.subscribes) == 1
    stream.feeds.leave(first)
    assert stream.unsubscribes == []
    stream.deliver(delivery([4]))
    assert (first_watcher.seqs, second_watcher.seqs) == ([1, 2, 3], [3, 4])
    stream.feeds.leave(second)
    assert [order.subscription_id for order in stream.unsubscribes] == [stream.subscribes[0].subscription_id]
    assert len(stream.feeds) == 0


def test_a_watcher_joins_while_events_come() -> None:
    stream, late = Stream(), Recorded()
    stream.follow(0)
    stream.deliver(delivery([1, 2]))
    joining = Follow(late, Run())
    stream.feeds.hold(joining)
    stream.deliver(delivery([3, 4]))
    assert late.seqs == []
    for seq in (1, 2, 3):
        joining.replay(encode(event(seq)))
    assert stream.feeds.settle(joining)
    stream.deliver(delivery([5]))
    assert late.seqs == [1, 2, 3, 4, 5]


def test_a_watcher_that_is_behind_the_feed_reads_on() -> None:
    stream, late = Stream(), Recorded()
    stream.follow(0)
    joining = Follow(late, Run())
    stream.feeds.hold(joining)
    stream.deliver(delivery(range(1, LENGTH)))
    # The log was read from a moment before the first event was seen to be missing.
    joining.sent_seq = 0
    joining.hold()
    assert not stream.feeds.settle(joining)
    stream.feeds.hold(joining)
    for seq in range(1, LENGTH):
        joining.replay(encode(event(seq)))
    assert stream.feeds.settle(joining)
    stream.deliver(delivery([LENGTH]))
    assert late.seqs == list(range(1, LENGTH + 1))
    assert late.ends == [None]


def test_a_run_that_ends_while_a_watcher_joins_has_ended_for_it_too() -> None:
    stream, late = Stream(), Recorded()
    stream.follow(0)
    joining = Follow(late, Run())
    stream.feeds.hold(joining)
    stream.deliver(delivery(range(1, LENGTH + 1)))
    assert stream.feeds.settle(joining)
    assert (late.seqs, late.ends) == (list(range(1, LENGTH + 1)), [None])
    assert joining.has_ended
    assert len(stream.feeds) == 0


def test_another_users_watcher_never_joins() -> None:
    stream, foreign = Stream(), Recorded()
    stream.follow(0)
    joining = Follow(foreign, Run(user_id="bob"))
    stream.feeds.hold(joining)
    stream.deliver(delivery([1]))
    assert stream.feeds.settle(joining)
    stream.deliver(delivery([2]))
    assert foreign.seqs == []
    assert [error.reason_name for error in foreign.ends if error is not None] == ["RUN_NOT_FOUND"]
    assert stream.feeds.foreign_count == 1


def test_a_refused_subscription_ends_its_follows_with_the_error() -> None:
    stream = Stream()
    _, watcher = stream.follow(0)
    refusal = state_pb2.Delivery(run_id="r", subscription_id=stream.subscribes[0].subscription_id)
    refusal.status.CopyFrom(to_status(MainspringError(Reason.RUN_NOT_FOUND, "no", run_id="r")))
    stream.deliver(refusal)
    assert [error.reason_name for error in watcher.ends if error is not None] == ["RUN_NOT_FOUND"]
    assert len(stream.feeds) == 0


def test_a_refusal_that_passes_is_retried() -> None:
    stream = Stream()
    _, watcher = stream.follow(0)
    refusal = delivery([], subscription_id=stream.subscribes[0].subscription_id)
    refusal.status.CopyFrom(to_status(MainspringError(Reason.PEER_UNAVAILABLE, "no", peer="postgres")))
    stream.deliver(delivery([1]), refusal)
    assert len(stream.subscribes) == 1
    stream.feeds.retry()
    assert [order.after_seq for order in stream.subscribes] == [0, 1]
    stream.feeds.retry()
    assert len(stream.subscribes) == 2
    assert watcher.ends == []


def test_the_word_of_an_earlier_subscription_counts_for_nothing() -> None:
    stream = Stream()
    _, watcher = stream.follow(0)
    refusal = delivery([], subscription_id=stream.subscribes[0].subscription_id)
    refusal.status.CopyFrom(to_status(MainspringError(Reason.RUN_NOT_FOUND, "no", run_id="r")))
    stream.deliver(delivery([2]), refusal)
    assert watcher.ends == []


def test_an_event_of_a_later_release_ends_the_follow() -> None:
    stream = Stream()
    _, watcher = stream.follow(0)
    found = delivery([])
    found.events.append(events_pb2.RunEvent(run_id="r", seq=1))
    stream.deliver(found)
    assert [error.reason_name for error in watcher.ends if error is not None] == ["INTERNAL"]


def test_what_is_subscribed_and_ended_in_one_frame_is_not_sent() -> None:
    stream = Stream()
    kept, _ = stream.follow(0)
    stream.feeds.leave(kept)
    stream.follow(0)
    request = combine([*stream.orders, state_pb2.Unsubscribe(subscription_id=0, run_id="started")])
    assert [order.subscription_id for order in request.subscribe] == [stream.subscribes[-1].subscription_id]
    assert [order.subscription_id for order in request.unsubscribe] == [0]


@given(st.data())
def test_whatever_is_lost_repeated_or_cut_every_event_comes_once_in_order(data: st.DataObject) -> None:
    """State sends any ranges of the log, and streams break at any time; each new subscription is answered from the log.

    A watcher joins at a random moment. At the end state sends all that was asked for.
    """
    stream = Stream()
    _, first = stream.follow(0)
    late, joining = Recorded(), None
    for step in range(data.draw(st.integers(0, 12))):
        choice = data.draw(st.sampled_from(["live", "live", "break", "join"]))
        if choice == "live":
            begin = data.draw(st.integers(1, LENGTH - 1))
            stream.deliver(delivery(range(begin, data.draw(st.integers(begin, LENGTH - 1)) + 1)))
        elif choice == "break":
            stream.feeds.detach()
            stream.attach(f"follower-{step}")
        elif joining is None:
            joining = Follow(late, Run())
            stream.feeds.hold(joining)
    if joining is not None:
        seen = max(first.seqs, default=0)
        for seq in range(1, seen + 1):
            joining.replay(encode(event(seq)))
        assert stream.feeds.settle(joining)
    stream.feeds.detach()
    stream.attach("last")
    for order in stream.subscribes:
        rest = range(order.after_seq + 1, LENGTH + 1)
        stream.deliver(delivery(rest, subscription_id=order.subscription_id, caught_up=True))
    whole = list(range(1, LENGTH + 1))
    assert first.seqs == whole
    assert first.ends == [None]
    if joining is not None:
        assert late.seqs == whole
        assert late.ends == [None]


def text(offset: int, words: str, *, step: int = 1, run: Run | None = None) -> state_pb2.Delivery:
    """Unfinished text of a step."""
    found = delivery([], run=run)
    found.deltas.add(run_id="r", step=step, offset=offset, text=words)
    return found


def test_text_is_shown_as_it_comes_and_to_the_late_from_its_beginning() -> None:
    stream = Stream()
    _, early = stream.follow(after_seq=0)
    stream.deliver(text(0, "Grüße "), text(6, "🌍"), text(7, "!"))
    _, late = stream.follow(after_seq=0)
    stream.deliver(text(8, "?"))
    assert early.texts == [(1, 0, "Grüße "), (1, 6, "🌍"), (1, 7, "!"), (1, 8, "?")]
    assert late.texts == [(1, 0, "Grüße 🌍!"), (1, 8, "?")]


def test_text_ends_with_its_steps_event_and_what_comes_behind_is_dropped() -> None:
    stream = Stream()
    follow, watcher = stream.follow(after_seq=0)
    stream.deliver(text(0, "one"))
    follow.watcher = silent = Recorded()
    silent.show_text = lambda follow: None  # type: ignore[method-assign]  # it takes nothing yet
    stream.deliver(text(3, " two"), delivery([1]), text(7, " three"), text(0, "again"))
    assert (watcher.texts, follow.take_text()) == ([(1, 0, "one")], b"")
    stream.deliver(text(0, "next", step=2))
    assert b"next" in follow.take_text()


def test_text_of_the_next_step_outlives_what_else_happens() -> None:
    stream = Stream()
    _, watcher = stream.follow(after_seq=0)
    outcome = delivery([])
    outcome.events.add(run_id="r", seq=1, tool_completed=events_pb2.ToolCompleted(call_id="c"))
    stream.deliver(text(0, "one"), outcome, text(3, " two"))
    assert watcher.texts == [(1, 0, "one"), (1, 3, " two")]


def test_text_of_a_step_whose_end_was_read_from_the_log_comes_too_late() -> None:
    stream = Stream()
    _, watcher = stream.follow(after_seq=0, log=[1, 2])
    stream.deliver(text(0, "old", step=2), text(0, "new", step=3))
    assert watcher.texts == [(3, 0, "new")]


def test_another_attempt_shows_its_text_from_the_beginning() -> None:
    stream = Stream()
    _, watcher = stream.follow(after_seq=0)
    stream.deliver(text(0, "A first"), text(0, "A second"))
    assert watcher.texts == [(1, 0, "A first"), (1, 0, "A second")]


def test_text_with_a_hole_before_it_is_not_shown_and_what_is_known_not_twice() -> None:
    stream = Stream()
    _, watcher = stream.follow(after_seq=0)
    stream.deliver(text(4, "lost"), text(0, "abcd"), text(6, "hole"), text(2, "cdef"))
    assert watcher.texts == [(1, 0, "abcd"), (1, 4, "ef")]


def test_text_under_anothers_name_is_dropped_and_counted() -> None:
    stream = Stream()
    _, watcher = stream.follow(after_seq=0)
    stream.deliver(text(0, "x", run=Run(user_id="bob")), text(0, "y", run=Run(tenant_id="other")))
    assert (watcher.texts, stream.feeds.foreign_count) == ([], 2)


def test_who_reads_the_log_is_shown_no_text_until_it_has_caught_up() -> None:
    stream = Stream()
    _, watcher = stream.follow(after_seq=0)
    reading = Recorded()
    follow = Follow(reading, Run(), after_seq=0)
    stream.feeds.hold(follow)
    stream.deliver(text(0, "so far"))
    assert (watcher.texts, reading.texts) == ([(1, 0, "so far")], [])
    assert stream.feeds.settle(follow)
    assert reading.texts == [(1, 0, "so far")]


def test_a_sub_run_is_told_to_who_is_shown_its_announcement() -> None:
    stream = Stream()
    _, watcher = stream.follow(after_seq=0)
    announced = delivery([])
    announced.events.add(run_id="r", seq=1, tool_executing=events_pb2.ToolExecuting(call_id="c", sub_run_id="child"))
    stream.deliver(announced, announced)
    assert watcher.branches == [("r", "child")]
