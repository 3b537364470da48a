"""What the board moves about: calls, workers, lines, and the two ways out of it. Values with no rules of their own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from mainspring.v1 import dispatcher_pb2 as pb
from mainspring.v1 import types_pb2

TOOL_TIMEOUT_SECONDS_DEFAULT: Final = 30.0
TOOL_TIMEOUT_SECONDS_MAX: Final = 3_600.0

# Whose tool ("": everybody's) and its name.
ToolKey = tuple[str, str]


class Link(Protocol):
    """The way to an attached worker. Nothing here waits or raises; a link at its bound closes itself."""

    def call(self, call: pb.WorkerCall) -> None:
        """Sends a call."""

    def cancel(self, dispatch_id: int) -> None:
        """Asks for the end of a call."""

    def close(self, fault: str) -> None:
        """Ends the stream, telling the worker why."""


class Caller(Protocol):
    """The stream that a call came from. Nothing here waits or raises."""

    @property
    def gone(self) -> bool:
        """Nobody reads its answers any more."""

    def answer(self, result: pb.ToolResult) -> None:
        """Sends an outcome."""


@dataclass(frozen=True, slots=True)
class ToolFacts:
    """What the catalogue says of a tool."""

    effect: types_pb2.EffectClass.ValueType
    timeout_seconds: float


TOOL_UNKNOWN: Final = ToolFacts(types_pb2.EFFECT_CLASS_UNSPECIFIED, TOOL_TIMEOUT_SECONDS_DEFAULT)


def facts_of(tool: types_pb2.Tool) -> ToolFacts:
    """A declaration's facts, with its defaults and bounds."""
    seconds = tool.timeout.ToNanoseconds() / 1e9 if tool.HasField("timeout") else TOOL_TIMEOUT_SECONDS_DEFAULT
    return ToolFacts(tool.effect, min(max(seconds, 0.001), TOOL_TIMEOUT_SECONDS_MAX))


@dataclass(slots=True, eq=False)
class Cancel:
    """One who asked for a call's end, and when."""

    time: float
    told: Callable[[pb.CancelOutcome], None]


@dataclass(slots=True, eq=False)
class Call:
    """A call under way: who waits for it, where it runs. It is in a line, or in `workers`, until it is settled."""

    message: pb.ToolCall
    key: ToolKey
    facts: ToolFacts
    order: int
    since: float
    deadline: float
    timeout_seconds: float
    callers: list[tuple[Caller, int]]
    executions: int = 0
    dispatch_id: int = 0
    workers: dict[int, Worker] = field(default_factory=dict)
    cancels: list[Cancel] = field(default_factory=list)
    cancelled_time: float | None = None

    @property
    def identity(self) -> tuple[str, str]:
        """What makes two calls the same."""
        return self.message.context.tenant_id, self.message.call_id

    @property
    def repeatable(self) -> bool:
        """Whether it may be executed again: the stricter word counts, the log's intent or the catalogue's."""
        return types_pb2.EFFECT_CLASS_UNSAFE not in (self.message.effect, self.facts.effect)


@dataclass(slots=True, eq=False)
class Worker:
    """An attached worker, or one that broke off and may yet come back."""

    tenant_id: str
    worker_id: str
    link: Link | None = None
    keys: tuple[ToolKey, ...] = ()
    concurrency: int = 0
    seen: float = 0.0
    draining: bool = False
    # What it runs, by dispatch id; None: nobody wants it any more, but it fills a place until the worker says it ended.
    calls: dict[int, Call | None] = field(default_factory=dict)

    @property
    def takes_calls(self) -> bool:
        """Whether another call may be sent to it."""
        return self.link is not None and not self.draining and len(self.calls) < self.concurrency

    @property
    def load(self) -> float:
        """How much of it is used, from 0."""
        return len(self.calls) / self.concurrency


@dataclass(slots=True, eq=False)
class Line:
    """Calls that wait for one tool, oldest first. `unserved_time`: when its last worker left."""

    unserved_time: float
    calls: OrderedDict[int, Call] = field(default_factory=OrderedDict)


@dataclass(slots=True)
class Counts:
    """What the metrics show; only ever grows."""

    calls: int = 0
    dispatches: int = 0
    workers_lost: int = 0
    results_late: int = 0
