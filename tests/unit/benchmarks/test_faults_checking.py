"""The checker of the fault drill bites: each kind of breach, made up, is found; a whole run is not blamed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from mainspring.v1 import events_pb2 as pb
from mainspring.v1 import types_pb2
from mainspring_gateway.core.events import encode

from benchmarks.faults.checking import Checker, EventRow, RunRow
from benchmarks.faults.client import Ledger
from benchmarks.faults.runs import COUNT_TOOL, Run, Seen

pytestmark = pytest.mark.unit

RUN, CALL, USER = "run-1", "run-1.2.0", "ann"


def whole_log() -> list[pb.RunEvent]:
    """A run with one keyed call, from its start to its end."""
    payloads: list[dict[str, object]] = [
        {"agent_started": pb.AgentStarted(input=b"{}")},
        {"agent_thinking": pb.AgentThinking(step=1)},
        {"tool_executing": pb.ToolExecuting(call_id=CALL, tool=COUNT_TOOL)},
        {"tool_completed": pb.ToolCompleted(call_id=CALL, tool=COUNT_TOOL, status=types_pb2.TOOL_STATUS_OK)},
        {"agent_completed": pb.AgentCompleted(result=b"1")},
    ]
    return [pb.RunEvent(run_id=RUN, seq=seq, **payload) for seq, payload in enumerate(payloads, 1)]  # type: ignore[arg-type]  # a payload


def rows_of(events: list[pb.RunEvent]) -> list[EventRow]:
    """The log as it is stored."""
    return [
        EventRow(event.run_id, event.seq, event.WhichOneof("payload") or "", event.SerializeToString())
        for event in events
    ]


def seen_of(events: list[pb.RunEvent]) -> Seen:
    """The log as it was shown."""
    return Seen(
        [hash(encode(event).payload) for event in events],
        [float(event.seq) for event in events],
        [event.WhichOneof("payload") or "" for event in events],
    )


@dataclass
class Left:
    """What a drill has left behind: here nothing is wrong with it."""

    log: list[EventRow] = field(default_factory=lambda: rows_of(whole_log()))
    seen: Seen = field(default_factory=lambda: seen_of(whole_log()))
    effects: Counter[str] = field(default_factory=lambda: Counter({CALL: 1}))
    stored: dict[str, RunRow] = field(default_factory=lambda: {RUN: RunRow(USER, 5)})
    run_id: str = RUN
    refused_at: str = ""
    refusal: str = ""

    def blamed(self) -> Counter[str]:
        """What the checker says to it."""
        run = Run("key", USER, b"", 1, 0.0, self.refused_at, self.run_id, refusal=self.refusal, seen=self.seen)
        ledger = Ledger()
        checker = Checker(ledger, runs=[run], rows=self.stored, effects=self.effects)
        for run_id in self.stored:
            checker.check_log(run_id, self.log if run_id == RUN else [])
        checker.check_foreign(USER, {RUN: self.seen})
        checker.finish()
        return ledger.counts


def test_a_whole_run_is_not_blamed() -> None:
    assert Left().blamed() == {}


def gap(left: Left) -> None:
    del left.log[1]


def hidden_event(left: Left) -> None:
    left.seen.digests.pop(2)


def other_payload(left: Left) -> None:
    left.seen.digests[1] = 0


def other_columns(left: Left) -> None:
    left.log[1] = replace(left.log[1], type="agent_started")


def other_result(left: Left) -> None:
    events = whole_log()
    events[4].agent_completed.result = b"2"
    left.log = rows_of(events)


def no_end(left: Left) -> None:
    left.log.pop()
    left.stored = {RUN: RunRow(USER, 4)}


def end_not_shown(left: Left) -> None:
    left.seen.types[-1] = "agent_thinking"


def two_ends(left: Left) -> None:
    left.log.append(replace(left.log[-1], seq=6))
    left.stored = {RUN: RunRow(USER, 6)}


def not_stored(left: Left) -> None:
    left.stored = {}


def never_answered(left: Left) -> None:
    left.run_id = ""


def refused_for_good(left: Left) -> None:
    left.refusal = "INTERNAL"


def second_run(left: Left) -> None:
    left.stored |= {"run-2": RunRow(USER, 0)}


def second_effect(left: Left) -> None:
    left.effects[CALL] = 2


def unknown_effect(left: Left) -> None:
    left.effects["run-9.2.0"] = 1


def no_effect(left: Left) -> None:
    left.effects.clear()


def strangers_run(left: Left) -> None:
    left.stored = {RUN: RunRow("bob", 5)}


def failed(left: Left) -> None:
    error = types_pb2.RunError(reason="INTERNAL")
    left.log[-1] = rows_of([pb.RunEvent(run_id=RUN, seq=5, agent_failed=pb.AgentFailed(error=error))])[0]


@pytest.mark.parametrize(
    ("breach", "name"),
    [
        (gap, "gaps"),
        (hidden_event, "gaps"),
        (other_payload, "mismatched"),
        (other_columns, "mismatched"),
        (other_result, "mismatched"),
        (no_end, "lost"),
        (end_not_shown, "lost"),
        (two_ends, "doubled"),
        (not_stored, "lost"),
        (never_answered, "lost"),
        (refused_for_good, "lost"),
        (second_run, "doubled"),
        (second_effect, "doubled"),
        (unknown_effect, "doubled"),
        (no_effect, "lost"),
        (strangers_run, "foreign"),
        (failed, "lost"),
    ],
)
def test_a_breach_is_found(breach: Callable[[Left], None], name: str) -> None:
    left = Left()
    breach(left)
    assert left.blamed()[name] > 0


def test_only_a_marked_run_may_end_without_the_value_that_was_refused() -> None:
    error = types_pb2.RunError(reason="EVENT_REFUSED")
    events = [*whole_log()[:4], pb.RunEvent(run_id=RUN, seq=5, agent_failed=pb.AgentFailed(error=error))]
    left = Left(log=rows_of(events), seen=seen_of(events))
    assert left.blamed() == {"lost": 1}
    left.refused_at = "agent_completed"
    assert left.blamed() == {}
