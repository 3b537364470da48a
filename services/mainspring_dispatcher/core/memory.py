"""Outcomes of calls that must not run twice, kept a while for a sender whose stream broke before the answer."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from mainspring.v1 import dispatcher_pb2 as pb

from mainspring_dispatcher.core.parts import Call

OUTCOMES_MAX: Final = 10_000
BYTES_MAX: Final = 64 << 20
KEEP_SECONDS: Final = 60.0

# Tenant, call and attempt: another attempt is somebody's decision to call again.
_Key = tuple[str, str, int]


class Memory:
    """The last outcomes, bounded in number, bytes and age; the oldest goes first."""

    def __init__(self) -> None:
        self._bytes = 0
        self._outcomes: OrderedDict[_Key, tuple[float, int, pb.WorkerResult]] = OrderedDict()

    def keep(self, call: Call, outcome: pb.WorkerResult, *, now: float) -> None:
        """Remembers a call's outcome with the number of its executions."""
        former = self._outcomes.pop(_key(call.message), None)
        if former is not None:
            self._bytes -= len(former[2].result)
        self._outcomes[_key(call.message)] = (now + KEEP_SECONDS, call.executions, outcome)
        self._bytes += len(outcome.result)
        while len(self._outcomes) > OUTCOMES_MAX or (self._bytes > BYTES_MAX and len(self._outcomes) > 1):
            self._forget_oldest()

    def recall(self, message: pb.ToolCall) -> tuple[pb.WorkerResult, int] | None:
        """The outcome that this very attempt of the call has had, and after how many executions."""
        if not self._outcomes:
            return None
        kept = self._outcomes.get(_key(message))
        return None if kept is None else (kept[2], kept[1])

    def forget(self, now: float) -> None:
        """Lets go of what is too old."""
        while self._outcomes and next(iter(self._outcomes.values()))[0] <= now:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        _, (_, _, outcome) = self._outcomes.popitem(last=False)
        self._bytes -= len(outcome.result)


def _key(message: pb.ToolCall) -> _Key:
    return message.context.tenant_id, message.call_id, message.attempt
