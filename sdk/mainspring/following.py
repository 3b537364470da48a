"""How far a run and those below it have been followed, and when a socket that broke is opened again."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

TERMINAL: Final = frozenset({"agent_completed", "agent_failed", "agent_cancelled", "agent_timed_out"})
RECONNECT_SECONDS_MAX: Final = 10.0
RECONNECT_TRIES_MAX: Final = 60

_RECONNECT_SECONDS_FIRST: Final = 0.05


@dataclass(slots=True)
class Position:
    """How far a run has been followed, and with `below` the runs that it starts."""

    run_id: str = ""
    after_seq: int = 0
    below: dict[str, Position] | None = None

    def frames(self) -> list[dict[str, Any]]:
        """What follows them from here. Announced runs are followed by the gateway itself, but only the first time."""
        own = {"op": "follow", "id": "follow", "run_id": self.run_id, "after_seq": self.after_seq}
        branches = (self.below or {}).values()
        return [own, *({**branch.frames()[0], "id": "branch"} for branch in branches if branch.after_seq >= 0)]

    def passes(self, frame: Mapping[str, Any]) -> bool:
        """Whether an event is new and wanted; it then is the position."""
        if self.run_id in ("", frame["run_id"]):
            self.run_id, position = frame["run_id"], self
        elif self.below is None or frame["run_id"] not in self.below:
            return False
        else:
            position = self.below[frame["run_id"]]
        if position.after_seq < 0 or frame["seq"] <= position.after_seq:
            return False
        position.after_seq = frame["seq"]
        if self.below is not None and (sub_run_id := frame["data"].get("sub_run_id")):
            self.below.setdefault(sub_run_id, Position(sub_run_id))
        if position is not self and frame["type"] in TERMINAL:
            position.after_seq = -1
        return True

    def shows(self, run_id: str) -> bool:
        """Whether a run is followed here."""
        return self.run_id == run_id or run_id in (self.below or ())


class Backoff:
    """How long to wait before a socket is opened again. One that never opened is not tried again."""

    def __init__(self) -> None:
        self._has_worked = False
        self._tries = 0

    def reset(self) -> None:
        """The socket works."""
        self._has_worked = True
        self._tries = 0

    def is_exhausted(self) -> bool:
        """Whether the last failure is to be told."""
        return not self._has_worked or self._tries >= RECONNECT_TRIES_MAX

    def next_seconds(self) -> float:
        """Longer each time, and never the same for two clients."""
        longest = min(_RECONNECT_SECONDS_FIRST * 2**self._tries, RECONNECT_SECONDS_MAX)
        self._tries += 1
        return random.uniform(longest / 2, longest)
