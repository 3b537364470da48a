"""Unfinished text: whole from its beginning or not at all, bounded, and over when its step is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mainspring.v1 import events_pb2
from mainspring_state.core.drafts import CLOSING, DRAFT_BYTES_MAX, Draft, Drafts

pytestmark = pytest.mark.unit

KEY = ("acme", "r")


def delta(offset: int, text: str, step: int = 1) -> events_pb2.TextDelta:
    return events_pb2.TextDelta(run_id="r", step=step, offset=offset, text=text)


def spoken(*pieces: str, bytes_max: int = 1 << 20) -> Drafts:
    drafts, offset = Drafts(bytes_max=bytes_max), 0
    for piece in pieces:
        assert drafts.add(KEY, delta(offset, piece), user_id="ann")
        offset += len(piece)
    return drafts


def text(drafts: Drafts, key: tuple[str, str] = KEY) -> str:
    draft = drafts.get(key)
    return draft.since(0) if draft is not None else ""


@given(st.lists(st.text(max_size=4)), st.integers(0, 20))
def test_the_text_since_any_offset_is_the_rest(pieces: list[str], offset: int) -> None:
    draft = Draft("ann", 1)
    for piece in pieces:
        draft.add(piece, size_bytes=1)
    assert draft.since(offset) == "".join(pieces)[offset:]


def test_pieces_are_taken_where_they_fit() -> None:
    drafts = spoken("Grüße", " 🌍")
    for wrong in (delta(8, "hole"), delta(3, "again"), delta(7, "another step", step=2), delta(7, "")):
        assert not drafts.add(KEY, wrong, user_id="ann")
    assert drafts.add(KEY, delta(7, "!"), user_id="ann")
    assert text(drafts) == "Grüße 🌍!"


def test_text_from_the_beginning_is_another_attempts() -> None:
    drafts = spoken("A first")
    first = drafts.get(KEY)
    assert drafts.add(KEY, delta(0, "A second"), user_id="ann")
    second = drafts.get(KEY)
    assert text(drafts) == "A second"
    assert first is not None and second is not None and first.number != second.number


def test_a_text_has_a_bound_and_then_takes_nothing_more() -> None:
    drafts = spoken("x" * (DRAFT_BYTES_MAX - 100), bytes_max=1 << 30)
    assert not drafts.add(KEY, delta(DRAFT_BYTES_MAX - 100, "y" * 100), user_id="ann")
    assert not drafts.add(KEY, delta(DRAFT_BYTES_MAX, "z"), user_id="ann")


def test_over_the_bound_of_all_the_one_that_grew_longest_ago_goes() -> None:
    drafts = Drafts(bytes_max=1_000)
    keys = [("acme", name) for name in "abc"]
    for key in keys[:2]:
        assert drafts.add(key, delta(0, "x" * 300), user_id="ann")
    assert drafts.add(keys[0], delta(300, "x" * 100), user_id="ann")
    assert drafts.add(keys[2], delta(0, "x" * 300), user_id="ann")
    assert [key in drafts for key in keys] == [True, False, True]
    assert not Drafts(bytes_max=0).add(KEY, delta(0, "x"), user_id="ann")


def test_a_hand_over_leaves_the_text_of_the_step_that_has_begun() -> None:
    drafts = spoken("text")  # of the next agent, whose model begins before the hand-over is durable
    drafts.hear(KEY, events_pb2.RunEvent(agent_handed_off=events_pb2.AgentHandedOff()))
    assert KEY in drafts


@pytest.mark.parametrize("kind", [field.name for field in events_pb2.RunEvent.DESCRIPTOR.oneofs[0].fields])
def test_only_what_ends_its_step_ends_a_text(kind: str) -> None:
    drafts = spoken("text")
    event = events_pb2.RunEvent()
    getattr(event, kind).SetInParent()
    drafts.hear(KEY, event)
    assert (KEY in drafts) == (kind not in CLOSING)
    drafts.hear(KEY, events_pb2.RunEvent(agent_thinking=events_pb2.AgentThinking(step=1)))
    assert KEY not in drafts


def test_what_was_given_up_no_longer_counts() -> None:
    drafts = spoken("x" * 500, bytes_max=1_000)
    for _ in range(5):
        drafts.close(KEY)
        assert drafts.add(KEY, delta(0, "x" * 500), user_id="ann")
    assert len(text(drafts)) == 500
