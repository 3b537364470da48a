"""The invariants of runs that stand still, and of what people ask of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import orjson
from mainspring.v1 import events_pb2, state_pb2, types_pb2
from mainspring_execution.core.intrinsic import SIGNAL, SLEEP
from mainspring_kit.identity import UserExecutionContext

from tests.simulation.asking import RUNNING, Key
from tests.simulation.leasing import Schema

# Any in this module: JSON.

STANDING: Final = ("agent_waiting", "agent_paused")
# Times are rounded to microseconds in the log.
CLOCK_SECONDS: Final = 2e-6
ALLOW, DENY = types_pb2.APPROVAL_DECISION_ALLOW, types_pb2.APPROVAL_DECISION_DENY
_EVENTS: Final = {"signal": "signal_received", "pause": "agent_paused", "resume": "agent_resumed"}

Log = Sequence[events_pb2.RunEvent]


class Standing:
    """Sees every event when it becomes durable, every statement when it is over, and every answer that is taken."""

    def __init__(self, schema: Schema, expect: Callable[[object, str], None]) -> None:
        self.on_question: Callable[[Key, events_pb2.ApprovalRequested], None] = lambda key, question: None
        self.on_leave: Callable[[str], None] = lambda executor_id: None
        self._schema = schema
        self._expect = expect
        self._parked: list[Key] = []
        self._released: set[tuple[Key, int]] = set()
        self._takeovers: Counter[Key] = Counter()
        # By approval: the request that was first, or so it was told.
        self._answers: dict[str, str] = {}
        schema.on_release = self._note_release

    def committed(self, key: Key, log: Log, event: events_pb2.RunEvent, *, clock: float) -> None:
        """An event follows in the log; `clock`: its sender's."""
        kind = event.WhichOneof("payload")
        if kind in STANDING:
            self._parked.append(key)
        elif kind == "tool_completed":
            self._check_wait(log, event.tool_completed, clock=clock)
        elif kind == "signal_received":
            self._check_once(log, kind, event.signal_received.request_id)
        elif kind == "approval_requested":
            self.on_question(key, event.approval_requested)
        elif kind == "approval_resolved":
            self._check_answer(key, log, event.approval_resolved)
            if b"retry" in event.approval_resolved.data:
                self.on_leave(self._schema.held_by(key))
        elif kind == "run_recovered":
            was_released = (key, self._schema.runs[key]["epoch"] - 1) in self._released
            handed_back = event.run_recovered.handed_back
            self._expect(handed_back or not was_released, f"{key[1]}: given back, and taken for lost")
            is_possible = any(released == key for released, _ in self._released)
            self._expect(is_possible or not handed_back, f"{key[1]}: taken for given back, and nobody did")

    def granted(self, key: Key, epoch: int) -> None:
        """Somebody holds the run from now on."""
        takeovers = self._schema.runs[key]["takeovers"] if key in self._schema.runs else 0
        is_counted = takeovers > self._takeovers[key]
        self._takeovers[key] = takeovers
        was_released = (key, epoch - 1) in self._released
        self._expect(not (is_counted and was_released), f"{key[1]}: epoch {epoch - 1} gave it back, and that counts")

    def settled(self) -> None:
        """A statement is over: who stands still is held by nobody, and no more run at once than may."""
        schema = self._schema
        for key in self._parked:
            if schema.events[key][-1]["type"] in STANDING:
                self._expect(key not in schema.leases, f"{key[1]}: stands still, and is held")
        self._parked.clear()
        if schema.slots:
            running: Counter[tuple[str, str]] = Counter()
            limits: dict[tuple[str, str], int] = {}
            for key, run in schema.runs.items():
                for scope, limit in run["caps"]:
                    limits[key[0], scope] = limit
                    running[key[0], scope] += run["state"] == RUNNING
            for where, limit in limits.items():
                self._expect(running[where] <= limit, f"{running[where]} runs of {where} at once, {limit} may")

    def called(self, key: Key, log: Log, what: str) -> None:
        """The run's executor has something done."""
        switches = (event.HasField("agent_paused") for event in reversed(log) if _is_switch(event))
        # That it goes on may be on its way into the log.
        is_paused = next(switches, False) and all(row["kind"] != "resume" for row in self._schema.unconsumed(key))
        self._expect(not is_paused, f"{key[1]}: {what} while it is paused")

    def was_taken(self, user: UserExecutionContext, request: state_pb2.PutInputRequest) -> None:
        """A person is told that what was asked for is stored."""
        key = (user.tenant_id, user.run_id)
        stored = self._schema.inputs.get(key, {}).get(request.request_id)
        self._expect(stored is not None, f"{key[1]}: {request.request_id} is said to be stored")
        if request.HasField("approval"):
            approval_id = request.approval.approval_id
            first = self._answers.setdefault(approval_id, request.request_id)
            self._expect(first == request.request_id, f"{approval_id} takes {first} and {request.request_id}")
            owner = self._schema.runs[key]["user_id"]
            self._expect(user.user_id == owner, f"{approval_id} is answered by {user.user_id}, it is {owner}'s")

    def judge(self, key: Key, log: Log) -> None:
        """At the end: what was taken has been done, once."""
        inputs = list(self._schema.inputs.get(key, {}).values())
        for place, row in enumerate(inputs):
            event = _EVENTS.get(row["kind"])
            if row["consumed_seq"] is None or event is None:
                continue
            times = sum(_request_of(known, event) == row["request_id"] for known in log)
            # A pause that was taken back before it came to it needs no event, nor does what took it back.
            is_moot = (row["kind"] == "pause" and any(later["kind"] == "resume" for later in inputs[place:])) or (
                row["kind"] == "resume" and any(former["kind"] == "pause" for former in inputs[:place])
            )
            self._expect(times == 1 or (times == 0 and is_moot), f"{key[1]}: {row['request_id']} is done {times} times")
        asked = [event.approval_requested.approval_id for event in log if event.HasField("approval_requested")]
        resolved = Counter(event.approval_resolved.approval_id for event in log if event.HasField("approval_resolved"))
        self._expect(all(resolved[approval_id] == 1 for approval_id in asked), f"{key[1]}: {asked} became {resolved}")

    def _note_release(self, key: Key, epoch: int) -> None:
        self._released.add((key, epoch))

    def _check_once(self, log: Log, kind: str, request_id: str) -> None:
        again = any(_request_of(known, kind) == request_id for known in log)
        self._expect(not again, f"{kind} of {request_id} comes twice")

    def _check_wait(self, log: Log, outcome: events_pb2.ToolCompleted, *, clock: float) -> None:
        if outcome.tool not in (SLEEP, SIGNAL):
            return
        is_ok = outcome.status == types_pb2.TOOL_STATUS_OK
        if outcome.status == types_pb2.TOOL_STATUS_TIMED_OUT or (is_ok and outcome.tool == SLEEP):
            intent = next(known for known in log if known.tool_executing.call_id == outcome.call_id).tool_executing
            wake_time = intent.wake_time.ToNanoseconds() / 1e9
            self._expect(
                clock >= wake_time - CLOCK_SECONDS, f"{outcome.call_id} is over {wake_time - clock:.3f} s early"
            )
        elif is_ok:
            taken: Any = orjson.loads(outcome.result)
            same = [
                known
                for known in log
                if known.tool_completed.tool == SIGNAL and known.tool_completed.status == types_pb2.TOOL_STATUS_OK
            ]
            again = any(orjson.loads(known.tool_completed.result) == taken for known in same)
            self._expect(not again, f"{outcome.call_id}: the signal {taken} is taken twice")
            came = any(
                known.signal_received.name == taken["name"]
                and orjson.loads(known.signal_received.data) == taken["data"]
                for known in log
                if known.HasField("signal_received")
            )
            self._expect(came, f"{outcome.call_id}: the signal {taken} never came")

    def _check_answer(self, key: Key, log: Log, resolved: events_pb2.ApprovalResolved) -> None:
        approval_id = resolved.approval_id
        again = any(known.approval_resolved.approval_id == approval_id for known in log)
        self._expect(not again, f"{approval_id} is resolved twice")
        if resolved.decision in (ALLOW, DENY):
            request_id = self._answers.get(approval_id)
            inputs = self._schema.inputs.get(key, {}).values()
            first = next(row for row in inputs if approval_id.encode() in row["payload"])
            self._expect(request_id in (None, first["request_id"]), f"{approval_id}: {request_id} was told to be first")
            answer = state_pb2.RunInput.FromString(first["payload"]).approval
            same = (answer.decision, answer.data) == (resolved.decision, resolved.data)
            self._expect(same, f"{approval_id}: not the first answer counts")


def _is_switch(event: events_pb2.RunEvent) -> bool:
    return event.HasField("agent_paused") or event.HasField("agent_resumed")


def _request_of(event: events_pb2.RunEvent, kind: str) -> str:
    return getattr(event, kind).request_id if event.HasField(kind) else ""  # type: ignore[arg-type]  # by name
