"""Numbered publications: the envelope, and noticing what was missed."""

from __future__ import annotations

import pytest
from mainspring_state.core import hearing
from mainspring_state.core.hearing import BEAT, FRAME, SILENCE_SECONDS, Hearing, Publication

pytestmark = pytest.mark.unit

ONE = "0199aaaa-bbbb-7ccc-8ddd-000000000001"
TWO = "0199aaaa-bbbb-7ccc-8ddd-000000000002"


def said(kind: bytes, number: int, state_id: str = ONE) -> Publication:
    return Publication(state_id, kind, number, b"")


def test_a_publication_survives_its_envelope() -> None:
    publication = Publication(ONE, FRAME, 2**40, b"body")
    assert hearing.unpack(hearing.pack(publication)) == publication
    assert hearing.unpack(b"short") is None


def test_an_input_survives_its_envelope() -> None:
    assert hearing.unpack_input(hearing.pack_input("exécutor", b"\x01\x02")) == ("exécutor", b"\x01\x02")


def test_a_stranger_may_have_been_missed() -> None:
    assert Hearing().hear(said(BEAT, 5), now_seconds=0)


def test_frames_in_order_and_beats_between_them_miss_nothing() -> None:
    heard = Hearing()
    heard.hear(said(BEAT, 5), now_seconds=0)
    assert not heard.hear(said(FRAME, 6), now_seconds=0.1)
    assert not heard.hear(said(BEAT, 6), now_seconds=0.2)
    assert not heard.hear(said(hearing.INPUT, 6), now_seconds=0.2)
    assert not heard.hear(said(FRAME, 7), now_seconds=0.3)


@pytest.mark.parametrize("later", [said(FRAME, 7), said(BEAT, 6), said(FRAME, 4)])
def test_a_gap_in_the_numbers_is_noticed(later: Publication) -> None:
    heard = Hearing()
    heard.hear(said(BEAT, 5), now_seconds=0)
    assert heard.hear(later, now_seconds=0.1)
    assert not heard.hear(said(BEAT, later.number), now_seconds=0.2)


def test_each_process_has_its_own_numbers() -> None:
    heard = Hearing()
    heard.hear(said(BEAT, 5), now_seconds=0)
    heard.hear(said(BEAT, 90, TWO), now_seconds=0)
    assert not heard.hear(said(FRAME, 6), now_seconds=0.1)
    assert not heard.hear(said(FRAME, 91, TWO), now_seconds=0.1)


def test_hearing_is_complete_while_every_living_peer_beats() -> None:
    heard = Hearing()
    assert heard.is_complete([], now_seconds=9)
    assert not heard.is_complete([ONE], now_seconds=9)
    heard.hear(said(BEAT, 1), now_seconds=9)
    assert heard.is_complete([ONE], now_seconds=9 + SILENCE_SECONDS)
    assert not heard.is_complete([ONE], now_seconds=9.01 + SILENCE_SECONDS)
    assert not heard.is_complete([ONE, TWO], now_seconds=9)


def test_the_dead_are_forgotten() -> None:
    heard = Hearing()
    heard.hear(said(BEAT, 1), now_seconds=0)
    assert heard.recent(now_seconds=4, within_seconds=5)
    assert not heard.recent(now_seconds=6, within_seconds=5)
    heard.forget(now_seconds=61, after_seconds=60)
    assert heard.hear(said(BEAT, 1), now_seconds=61)
