"""What this process knows of one run's log: the join of replay and live, without gap or duplicate."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

TAIL_EVENTS_MAX: Final = 256
TAIL_BYTES_MAX: Final = 256 << 10

_UNKNOWN: Final = -1


class Feed:
    """The run's last seq as far as it is known here, and its newest events as bytes."""

    __slots__ = ("last_seq", "step", "tail", "tail_bytes", "user_id")

    def __init__(self) -> None:
        self.user_id = ""
        self.last_seq = _UNKNOWN
        # The last model step that is known to have ended.
        self.step = 0
        self.tail: deque[bytes] = deque()
        self.tail_bytes = 0

    @property
    def is_known(self) -> bool:
        """Whether anything has told how far the log has come; before that the first events are taken as they come."""
        return self.last_seq != _UNKNOWN

    def misses(self, first_seq: int) -> bool:
        """Whether events are missing between what is known and this seq."""
        return self.is_known and first_seq > self.last_seq + 1

    def accept(self, first_seq: int, events: Sequence[bytes]) -> int:
        """Takes over what is new of events in order, and says how many of them were known; `misses` must be false."""
        known = min(len(events), max(0, self.last_seq + 1 - first_seq)) if self.is_known else 0
        for event in events[known:]:
            self.tail.append(event)
            self.tail_bytes += len(event)
        while len(self.tail) > TAIL_EVENTS_MAX or self.tail_bytes > TAIL_BYTES_MAX:
            self.tail_bytes -= len(self.tail.popleft())
        self.last_seq = max(self.last_seq, first_seq + len(events) - 1)
        return known

    def since(self, after_seq: int) -> list[bytes] | None:
        """The events after a seq if the tail still has them all, else None: they must be read from the log."""
        first_seq = self.last_seq - len(self.tail) + 1
        if not self.is_known or after_seq + 1 < first_seq:
            return None
        return list(self.tail)[max(0, after_seq + 1 - first_seq) :]

    def settle(self, seq: int) -> None:
        """The log has been read up to here, and nothing newer has been heard of."""
        if not self.is_known:
            self.last_seq = seq

    def shed(self) -> None:
        """Gives the tail up; what it held is in the log."""
        self.tail.clear()
        self.tail_bytes = 0
