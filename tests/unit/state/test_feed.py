"""The join of replay and live: no gap, no duplicate, whatever order things are heard in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mainspring_state.core.feed import TAIL_BYTES_MAX, TAIL_EVENTS_MAX, Feed

pytestmark = pytest.mark.unit


def events(first: int, last: int) -> list[bytes]:
    return [str(seq).encode() for seq in range(first, last + 1)]


def feed_with(first: int, last: int) -> Feed:
    feed = Feed()
    feed.accept(first, events(first, last))
    return feed


def test_a_new_feed_takes_its_first_events_wherever_they_begin() -> None:
    feed = Feed()
    assert not feed.is_known and not feed.misses(7)
    assert feed.accept(7, events(7, 9)) == 0
    assert (feed.is_known, feed.last_seq, feed.since(6)) == (True, 9, events(7, 9))


def test_what_is_known_is_dropped() -> None:
    feed = feed_with(1, 3)
    assert feed.accept(1, events(1, 3)) == 3
    assert feed.accept(2, events(2, 5)) == 2
    assert feed.since(0) == events(1, 5)


def test_a_gap_is_seen() -> None:
    feed = feed_with(1, 3)
    assert not feed.misses(4)
    assert feed.misses(5)


def test_the_tail_answers_only_what_it_holds_whole() -> None:
    feed = feed_with(5, 8)
    assert feed.since(3) is None
    assert feed.since(4) == events(5, 8)
    assert feed.since(8) == []
    assert Feed().since(0) is None


def test_a_settled_feed_goes_on_from_there() -> None:
    feed = Feed()
    feed.settle(4)
    assert (feed.last_seq, feed.misses(5), feed.misses(6), feed.since(3), feed.since(4)) == (4, False, True, None, [])
    feed.settle(9)
    assert feed.last_seq == 4


def test_the_tail_is_bounded_in_events_and_bytes() -> None:
    feed = feed_with(1, TAIL_EVENTS_MAX + 10)
    assert len(feed.tail) == TAIL_EVENTS_MAX
    assert feed.since(9) is None and feed.since(10) is not None
    feed.accept(feed.last_seq + 1, [b"x" * (TAIL_BYTES_MAX + 1)])
    assert (len(feed.tail), feed.tail_bytes) == (0, 0)


def test_a_shed_tail_is_read_from_the_log() -> None:
    feed = feed_with(1, 3)
    feed.shed()
    assert (feed.since(0), feed.since(3), feed.tail_bytes) == (None, [], 0)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 6)), max_size=60))
def test_what_was_accepted_is_always_one_piece(heard: list[tuple[int, int]]) -> None:
    feed = feed_with(1, 1)
    delivered = [1]
    for first, extra in heard:
        if not feed.misses(first):
            known = feed.accept(first, events(first, first + extra))
            delivered.extend(range(first + known, first + extra + 1))
    assert delivered == list(range(1, feed.last_seq + 1))
    assert feed.since(0) == events(1, feed.last_seq)
