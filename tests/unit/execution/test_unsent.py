"""Text that waits for a state process: merged to one piece a run, bounded, and the newest attempt's alone."""

import pytest
from mainspring_execution.core.unsent import FRAME_CHARACTERS_MAX, FRAME_RUNS_MAX, TextSource, Unsent

pytestmark = pytest.mark.unit


def source(run_id: str = "r", step: int = 1) -> TextSource:
    return TextSource(tenant_id="acme", user_id="ann", run_id=run_id, step=step)


def add(waiting: Unsent, said: TextSource, text: str) -> None:
    assert waiting.add(said, text)
    said.length += len(text)


def taken(waiting: Unsent) -> list[tuple[str, int, int, str]]:
    return [(d.delta.run_id, d.delta.step, d.delta.offset, d.delta.text) for d in waiting.take()]


def test_what_one_run_says_becomes_one_piece() -> None:
    waiting, one, other = Unsent(), source("a"), source("b", 3)
    for said, text in ((one, "Grü"), (other, "x"), (one, "ße")):
        add(waiting, said, text)
    assert taken(waiting) == [("a", 1, 0, "Grüße"), ("b", 3, 0, "x")]
    add(waiting, one, "!")
    assert taken(waiting) == [("a", 1, 5, "!")]
    assert len(waiting) == 0


def test_who_says_it_goes_with_it() -> None:
    waiting = Unsent()
    add(waiting, source(), "x")
    (published,) = waiting.take()
    assert (published.tenant_id, published.user_id) == ("acme", "ann")


def test_a_newer_attempt_takes_the_place_of_an_older() -> None:
    waiting, first, second = Unsent(), source(), source()
    add(waiting, first, "A first")
    add(waiting, second, "A second")
    assert taken(waiting) == [("r", 1, 0, "A second")]
    assert waiting._characters == 0


def test_at_the_bound_no_more_is_taken() -> None:
    waiting, said = Unsent(characters_max=10), source()
    add(waiting, said, "0123456789")
    assert not waiting.add(said, "x") and not waiting.add(source("b"), "x")
    assert taken(waiting) == [("r", 1, 0, "0123456789")]
    assert waiting.add(source("b"), "x")


def test_what_is_dropped_is_known_to_its_source() -> None:
    waiting, said = Unsent(), source()
    add(waiting, said, "lost")
    waiting.clear()
    assert (said.is_lost, len(waiting), taken(waiting)) == (True, 0, [])


def test_a_frame_is_bounded_and_the_rest_comes_next() -> None:
    waiting = Unsent()
    for number in range(FRAME_RUNS_MAX + 1):
        add(waiting, source(str(number)), "x")
    assert [len(waiting.take()), len(waiting.take())] == [FRAME_RUNS_MAX, 1]
    for number in range(3):
        add(waiting, source(str(number)), "x" * (FRAME_CHARACTERS_MAX // 2))
    assert [len(waiting.take()), len(waiting.take())] == [2, 1]


def test_half_of_a_pair_is_one_character_still() -> None:
    waiting = Unsent()
    add(waiting, source(), "a\ud83db")
    assert taken(waiting) == [("r", 1, 0, "a?b")]
