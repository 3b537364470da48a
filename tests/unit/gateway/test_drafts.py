"""A draft's frames: cut anywhere, they are the text; who keeps up with another is sent the same bytes."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mainspring_gateway.core.drafts import FRAME_CHARACTERS_MAX, Draft

pytestmark = pytest.mark.unit


def read(draft: Draft, offset: int) -> tuple[str, int]:
    """What one frame brings, and where it ends."""
    frame, end = draft.frame(offset)
    if not frame:
        return "", end
    fields = orjson.loads(frame[frame.index(b"{") :])
    assert (fields["op"], fields["run_id"], fields["step"], fields["offset"]) == ("delta", "r", 2, offset)
    return fields["text"], end


@given(st.lists(st.tuples(st.text(max_size=5), st.booleans())))
def test_frames_taken_at_any_moment_are_the_text(pieces: list[tuple[str, bool]]) -> None:
    draft, seen, offset = Draft("r", 2), "", 0
    for piece, looks in [*pieces, ("", True)]:
        draft.add(piece)
        if looks:
            text, offset = read(draft, offset)
            seen += text
    assert (seen, offset) == ("".join(piece for piece, _ in pieces), draft.length)


def test_all_that_keep_up_are_sent_the_same_bytes() -> None:
    draft = Draft("r", 2)
    draft.add("one")
    assert draft.frame(0)[0] is draft.frame(0)[0]
    draft.add("two")
    assert read(draft, 0) == ("onetwo", 6)
    assert draft.frame(3)[0] is draft.frame(3)[0]


def test_a_long_text_comes_in_several_frames() -> None:
    draft = Draft("r", 2)
    draft.add("x" * (FRAME_CHARACTERS_MAX + 1))
    assert read(draft, 0) == ("x" * FRAME_CHARACTERS_MAX, FRAME_CHARACTERS_MAX)
    assert read(draft, FRAME_CHARACTERS_MAX) == ("x", FRAME_CHARACTERS_MAX + 1)


def test_what_is_over_shows_nothing_more() -> None:
    draft = Draft("r", 2)
    draft.add("one")
    draft.end()
    assert draft.frame(0) == (b"", 0)
