"""What the watchers of one stream have been shown of unfinished text, and for which runs there is more to show.

A run that has more queues one empty delivery, filled with all that is new in the moment when the stream takes it: so
a slow reader gets longer pieces, not more of them, and text never takes the room of events.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mainspring.v1 import events_pb2, state_pb2

from mainspring_state.core.drafts import Draft, Drafts

FRAME_CHARACTERS_MAX: Final = 256 << 10

# Tenant and run.
Key = tuple[str, str]


class Showing:
    """The positions of one stream in the drafts of its runs."""

    def __init__(self, drafts: Drafts) -> None:
        self._drafts = drafts
        # The number of the draft that was shown last, and how many characters of it.
        self._shown: dict[Key, tuple[int, int]] = {}
        self._owed: dict[Key, state_pb2.Delivery] = {}

    def owe(self, key: Key) -> state_pb2.Delivery | None:
        """The delivery to queue, to be filled later; None: there is nothing to show, or one is queued."""
        draft = self._drafts.get(key)
        if draft is None or key in self._owed:
            return None
        delivery = self._owed[key] = state_pb2.Delivery(run_id=key[1], tenant_id=key[0], user_id=draft.user_id)
        return delivery

    def disown(self, key: Key) -> bool:
        """Leaves the queued delivery empty, if there is one: something else must come first."""
        return self._owed.pop(key, None) is not None

    def forget(self, key: Key) -> None:
        """Nobody watches the run on this stream any more."""
        self._owed.pop(key, None)
        self._shown.pop(key, None)

    def so_far(self, key: Key, *, is_first: bool) -> events_pb2.TextDelta | None:
        """All text of the run's step for a subscription that goes live now; what comes next joins it."""
        draft = self._drafts.get(key)
        if draft is None or not draft.length:
            return None
        if is_first:
            self._shown[key] = (draft.number, draft.length)
        return _delta(key, draft, offset=0, text=draft.since(0))

    def fill(self, deliveries: Sequence[state_pb2.Delivery]) -> list[Key]:
        """Puts into each queued delivery what is new. Gives the runs whose text the frame has no more room for."""
        unfinished: list[Key] = []
        room = FRAME_CHARACTERS_MAX
        for delivery in deliveries if self._owed else ():
            key = (delivery.tenant_id, delivery.run_id)
            if self._owed.get(key) is not delivery:
                continue
            del self._owed[key]
            draft = self._drafts.get(key)
            if draft is None:
                continue
            number, length = self._shown.get(key, (0, 0))
            offset = length if number == draft.number else 0
            text = draft.since(offset)[:room]
            room -= len(text)
            if text:
                delivery.deltas.append(_delta(key, draft, offset=offset, text=text))
            self._shown[key] = (draft.number, offset + len(text))
            if offset + len(text) < draft.length:
                unfinished.append(key)
        return unfinished


def _delta(key: Key, draft: Draft, *, offset: int, text: str) -> events_pb2.TextDelta:
    return events_pb2.TextDelta(run_id=key[1], step=draft.step, offset=offset, text=text)
