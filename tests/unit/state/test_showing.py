"""What a stream owes its watchers of unfinished text: filled in when it is taken, each character once."""

import pytest
from mainspring.v1 import events_pb2, state_pb2
from mainspring_state.core.drafts import Drafts
from mainspring_state.engine.showing import FRAME_CHARACTERS_MAX, Showing

pytestmark = pytest.mark.unit

KEY = ("acme", "r")


class Stream:
    """A showing over drafts, and its queue."""

    def __init__(self) -> None:
        self.drafts = Drafts(bytes_max=64 << 20)
        self.showing = Showing(self.drafts)
        self.queue: list[state_pb2.Delivery] = []

    def say(self, offset: int, text: str, *, key: tuple[str, str] = KEY, step: int = 1) -> None:
        delta = events_pb2.TextDelta(run_id=key[1], step=step, offset=offset, text=text)
        assert self.drafts.add(key, delta, user_id="ann")
        self.owe(key)

    def owe(self, key: tuple[str, str]) -> None:
        delivery = self.showing.owe(key)
        if delivery is not None:
            self.queue.append(delivery)

    def take(self) -> list[tuple[int, int, str]]:
        """What the stream sends now."""
        taken, self.queue = self.queue, []
        for key in self.showing.fill(taken):
            self.owe(key)
        return [(delta.step, delta.offset, delta.text) for delivery in taken for delta in delivery.deltas]


def test_what_waits_is_one_piece_however_much_is_said() -> None:
    stream = Stream()
    for number in range(50):
        stream.say(number, "x")
    assert len(stream.queue) == 1
    assert (stream.queue[0].tenant_id, stream.queue[0].user_id, stream.queue[0].run_id) == ("acme", "ann", "r")
    assert stream.take() == [(1, 0, "x" * 50)]
    stream.say(50, "y")
    assert stream.take() == [(1, 50, "y")]


def test_another_attempt_is_shown_from_its_beginning() -> None:
    stream = Stream()
    stream.say(0, "A first")
    stream.take()
    stream.say(0, "A second")
    assert stream.take() == [(1, 0, "A second")]


def test_text_that_is_over_leaves_its_place_empty() -> None:
    stream = Stream()
    stream.say(0, "gone")
    stream.drafts.close(KEY)
    assert stream.take() == []
    stream.say(0, "next", step=2)
    assert stream.take() == [(2, 0, "next")]


def test_what_must_come_behind_an_event_is_queued_behind_it() -> None:
    stream = Stream()
    stream.say(0, "before")
    assert stream.showing.disown(KEY) and not stream.showing.disown(KEY)
    event = state_pb2.Delivery(tenant_id="acme", run_id="r")
    event.events.add(seq=2)
    stream.queue.append(event)
    stream.owe(KEY)
    queue = list(stream.queue)
    assert stream.take() == [(1, 0, "before")]
    assert [bool(delivery.deltas) for delivery in queue] == [False, False, True]


def test_who_comes_late_gets_all_and_only_the_first_moves_the_position() -> None:
    stream = Stream()
    assert stream.showing.so_far(KEY, is_first=True) is None
    stream.say(0, "so far")
    late = stream.showing.so_far(KEY, is_first=False)
    assert late is not None and (late.offset, late.text) == (0, "so far")
    assert stream.take() == [(1, 0, "so far")]
    stream.showing.forget(KEY)
    stream.showing.so_far(KEY, is_first=True)
    stream.say(6, "!")
    assert stream.take() == [(1, 6, "!")]


def test_a_frame_has_its_bound_and_the_rest_is_owed_still() -> None:
    stream = Stream()
    keys = [("acme", name) for name in "abc"]
    for key in keys:
        stream.say(0, "x" * (FRAME_CHARACTERS_MAX // 2 + 10), key=key)
    sizes = [[len(text) for _, _, text in stream.take()] for _ in range(3)]
    half = FRAME_CHARACTERS_MAX // 2
    assert sizes == [[half + 10, half - 10], [20, half + 10], []]
