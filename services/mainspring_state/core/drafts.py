"""The unfinished text of model steps under way, as far as it was heard here: transient, bounded, and never the log."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from itertools import count
from typing import Final

from mainspring.v1 import events_pb2

# The longest text that a model step may have.
DRAFT_BYTES_MAX: Final = 1 << 20

# After these no text of an earlier step can follow; agent_thinking ends its own step's alone. At a hand-over the next
# agent's model may have begun before the event is durable.
CLOSING: Final = frozenset(
    {
        "agent_completed",
        "agent_failed",
        "agent_cancelled",
        "agent_timed_out",
        "agent_paused",
        "agent_waiting",
        "run_recovered",
    }
)

_numbers = count(1)


class Draft:
    """The text so far of one attempt at a model step. `number`: no other draft of this process has it."""

    __slots__ = ("_pieces", "_starts", "length", "number", "size_bytes", "step", "user_id")

    def __init__(self, user_id: str, step: int) -> None:
        self.user_id = user_id
        self.step = step
        self.number = next(_numbers)
        self.length = 0
        self.size_bytes = 0
        self._pieces: list[str] = []
        self._starts: list[int] = []

    def add(self, text: str, *, size_bytes: int) -> None:
        """Takes what follows."""
        self._pieces.append(text)
        self._starts.append(self.length)
        self.length += len(text)
        self.size_bytes += size_bytes

    def since(self, offset: int) -> str:
        """The text behind so many characters."""
        if offset >= self.length:
            return ""
        first = bisect_right(self._starts, offset) - 1
        return "".join(self._pieces[first:])[offset - self._starts[first] :]


class Drafts:
    """The drafts of all runs, by tenant and run; over the bound the one that has grown longest ago is given up."""

    def __init__(self, *, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._drafts: OrderedDict[tuple[str, str], Draft] = OrderedDict()

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._drafts

    def get(self, key: tuple[str, str]) -> Draft | None:
        """The run's draft, if there is any."""
        return self._drafts.get(key)

    def add(self, key: tuple[str, str], delta: events_pb2.TextDelta, *, user_id: str) -> bool:
        """Takes a piece of text; false where it brings nothing, or what comes before it is not known."""
        draft = self._drafts.get(key)
        if delta.offset == 0:
            self.close(key)
            draft = self._drafts[key] = Draft(user_id, delta.step)
        elif draft is None or draft.step != delta.step or draft.length != delta.offset:
            return False
        size_bytes = delta.ByteSize()
        if not delta.text or draft.size_bytes + size_bytes > DRAFT_BYTES_MAX:
            return False
        draft.add(delta.text, size_bytes=size_bytes)
        self._bytes += size_bytes
        self._drafts.move_to_end(key)
        while self._bytes > self._bytes_max:
            self.close(next(iter(self._drafts)))
        return key in self._drafts

    def hear(self, key: tuple[str, str], event: events_pb2.RunEvent) -> None:
        """Gives the run's draft up where an event tells its end."""
        draft = self._drafts.get(key)
        if draft is None:
            return
        kind = event.WhichOneof("payload")
        if kind in CLOSING or (kind == "agent_thinking" and draft.step <= event.agent_thinking.step):
            self.close(key)

    def close(self, key: tuple[str, str]) -> None:
        """Gives the run's draft up."""
        draft = self._drafts.pop(key, None)
        if draft is not None:
            self._bytes -= draft.size_bytes
