"""The lines in which calls wait for a worker, one per tool; among lines the oldest call goes first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mainspring_dispatcher.core.parts import Call, Line, ToolKey, Worker

# Of arguments: a call has up to 1 MiB of them, and thousands may wait.
WAITING_BYTES_MAX: Final = 256 << 20


class Lines:
    """Calls that wait. A line exists only while somebody stands in it."""

    def __init__(self, calls_max: int) -> None:
        self.count = 0
        self._bytes = 0
        self._calls_max = calls_max
        self._lines: dict[ToolKey, Line] = {}

    @property
    def full(self) -> bool:
        """No more calls may wait."""
        return self.count >= self._calls_max or self._bytes >= WAITING_BYTES_MAX

    def add(self, call: Call, now: float, *, in_front: bool = False) -> None:
        """Lets a call wait; in front when it has waited before."""
        line = self._lines.get(call.key)
        if line is None:
            line = self._lines[call.key] = Line(unserved_time=now)
        line.calls[call.order] = call
        if in_front:
            line.calls.move_to_end(call.order, last=False)
        self.count += 1
        self._bytes += len(call.message.arguments)

    def remove(self, call: Call) -> None:
        """Takes a call out, if it waits."""
        line = self._lines.get(call.key)
        if line is None or line.calls.pop(call.order, None) is None:
            return
        self.count -= 1
        self._bytes -= len(call.message.arguments)
        if not line.calls:
            del self._lines[call.key]

    def take_next(self, worker: Worker) -> Call | None:
        """The oldest call that the worker can take, taken out."""
        if not self.count:
            return None
        heads = [next(iter(self._lines[key].calls.values())) for key in worker.keys if key in self._lines]
        if not heads:
            return None
        call = min(heads, key=lambda head: head.order)
        self.remove(call)
        return call

    def take_named(self, name: str) -> list[Call]:
        """All calls that wait for any tool of that name, oldest first, taken out: a tool of the name became known."""
        calls = [call for key, line in self._lines.items() if key[1] == name for call in line.calls.values()]
        for call in calls:
            self.remove(call)
        return sorted(calls, key=lambda call: call.order)

    def desert(self, key: ToolKey, now: float) -> None:
        """The last worker that served the line has left."""
        if key in self._lines:
            self._lines[key].unserved_time = now

    def standing(self) -> Iterator[tuple[Call, float]]:
        """All calls that wait, each with the time since when nobody may have served its line."""
        for line in list(self._lines.values()):
            for call in list(line.calls.values()):
                yield call, max(call.since, line.unserved_time)
