"""What this process knows of one run's log: the join of replay and live, without gap or duplicate."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final, TypeVar

UNKNOWN: Final = -1
TAIL_EVENTS_MAX: Final = 256

Event = TypeVar("Event")


class Feed:
    """The run's last seq here, and its newest events as bytes. `last_seq` is UNKNOWN until something tells it."""

    __slots__ = ("is_ended", "last_seq", "tail", "tail_bytes", "tenant_id", "user_id")

    def __init__(self, tenant_id: str, user_id: str, *, last_seq: int = UNKNOWN) -> None:
        self.tenant_id = tenant_id
        self.user_id = user_id
        self.last_seq = last_seq
        self.is_ended = False
        self.tail: deque[bytes] = deque()
        self.tail_bytes = 0

    def misses(self, first_seq: int) -> bool:
        """Whether events are missing between what is known and this seq."""
        return self.last_seq != UNKNOWN and first_seq > self.last_seq + 1

    def accept(self, first_seq: int, events: Sequence[bytes]) -> int:
        """Takes over what is new of events in order, and says how many of them were known; `misses` must be false."""
        known = 0 if self.last_seq == UNKNOWN else min(len(events), max(0, self.last_seq + 1 - first_seq))
        for event in events[known:]:
            self.tail.append(event)
            self.tail_bytes += len(event)
        while len(self.tail) > TAIL_EVENTS_MAX:
            self.tail_bytes -= len(self.tail.popleft())
        self.last_seq = max(self.last_seq, first_seq + len(events) - 1)
        return known

    def since(self, after_seq: int) -> list[bytes] | None:
        """The events after a seq if the tail still has them all, else None: they must be read from the log."""
        first_seq = self.last_seq - len(self.tail) + 1
        if self.last_seq == UNKNOWN or after_seq + 1 < first_seq:
            return None
        return list(self.tail)[max(0, after_seq + 1 - first_seq) :]

    def settle(self, seq: int) -> None:
        """A replay has read the log up to here, and nothing newer has been heard of."""
        if self.last_seq == UNKNOWN:
            self.last_seq = seq
