"""The numbered publications of state processes: the envelope, and who has been missed."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

FRAME: Final = b"F"
BEAT: Final = b"B"
INPUT: Final = b"I"
READY: Final = b"R"
TEXT: Final = b"T"

BEAT_SECONDS: Final = 0.25
SILENCE_SECONDS: Final = 3 * BEAT_SECONDS

_HEADER: Final = struct.Struct(">36scQ")


@dataclass(frozen=True, slots=True)
class Publication:
    """What one state process tells the others. `number`: of its last frame, this one included."""

    state_id: str
    kind: bytes
    number: int
    body: bytes


def pack(publication: Publication) -> bytes:
    """The publication as one message."""
    return _HEADER.pack(publication.state_id.encode(), publication.kind, publication.number) + publication.body


def unpack(message: bytes) -> Publication | None:
    """The publication in a message; None for what is none."""
    if len(message) < _HEADER.size:
        return None
    state_id, kind, number = _HEADER.unpack_from(message)
    return Publication(state_id.decode(errors="replace"), kind, number, message[_HEADER.size :])


class Hearing:
    """What has been heard of the other state processes, and whether anything of it was missed."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, float]] = {}

    def hear(self, publication: Publication, *, now_seconds: float) -> bool:
        """Notes a publication; true when frames before it were missed, or nothing was known of its sender."""
        known = self._last.get(publication.state_id)
        self._last[publication.state_id] = (publication.number, now_seconds)
        expected = known[0] + (publication.kind == FRAME) if known is not None else None
        return publication.number != expected

    def is_complete(self, peers: Iterable[str], *, now_seconds: float) -> bool:
        """Whether every living peer has been heard of just now; otherwise its frames may have been missed."""
        return all(peer in self._last and now_seconds - self._last[peer][1] <= SILENCE_SECONDS for peer in peers)

    def recent(self, *, now_seconds: float, within_seconds: float) -> bool:
        """Whether any other process was heard within this time."""
        return any(now_seconds - heard <= within_seconds for _, heard in self._last.values())

    def forget(self, *, now_seconds: float, after_seconds: float) -> None:
        """Drops those that have been silent for so long."""
        self._last = {
            state_id: known for state_id, known in self._last.items() if now_seconds - known[1] <= after_seconds
        }


def pack_input(executor_id: str, run_input: bytes) -> bytes:
    """The body of an INPUT: for whom, and the serialized RunInput."""
    name = executor_id.encode()
    return struct.pack(">H", len(name)) + name + run_input


def unpack_input(body: bytes) -> tuple[str, bytes]:
    """What `pack_input` packed."""
    (length,) = struct.unpack_from(">H", body)
    return body[2 : 2 + length].decode(errors="replace"), body[2 + length :]
