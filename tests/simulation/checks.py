"""The invariants: looked at after every step that could break one, and once more when all is quiet."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Final

import orjson
from google.rpc import code_pb2
from mainspring.v1 import dispatcher_pb2, events_pb2, state_pb2, types_pb2
from mainspring_gateway.core.events import EncodedEvent, encode

from tests.simulation.asking import Key, Row
from tests.simulation.leasing import Schema
from tests.simulation.loop import Process
from tests.simulation.standing import Standing

TERMINAL: Final = frozenset({"agent_completed", "agent_failed", "agent_cancelled", "agent_timed_out"})
EFFECTS: Final = {
    "pure": types_pb2.EFFECT_CLASS_PURE,
    "idempotent": types_pb2.EFFECT_CLASS_IDEMPOTENT,
    "keyed": types_pb2.EFFECT_CLASS_KEYED,
    "unsafe": types_pb2.EFFECT_CLASS_UNSAFE,
}
AFTER_INTENT: Final = ("keyed", "unsafe")
# As the policy is where a specification says nothing.
ATTEMPTS_MAX: Final = 3
# Times are rounded to microseconds in the log.
CLOCK_NS: Final = 2_000


class ViolationError(Exception):
    """An invariant does not hold."""


class Checker:
    """Sees what crosses the boundaries of processes, and compares it with what is durable."""

    def __init__(self, schema: Schema, trace: Callable[[str], None], stop: Callable[[], None]) -> None:
        """`stop` ends the history: something is wrong."""
        self.violations: list[str] = []
        self.trace = trace
        self.on_claim: Callable[[str], None] = lambda executor_id: None
        self.on_end: Callable[[], None] = lambda: None
        self.effects: Counter[tuple[str, str, str]] = Counter()
        self.arrivals: Counter[str] = Counter()
        self._schema = schema
        self._stop = stop
        self._senders: dict[str, str] = {}
        self._grants: dict[tuple[Key, int], str] = {}
        self._parsed: dict[Key, list[events_pb2.RunEvent]] = {}
        self._answers: dict[str, tuple[str, int]] = {}
        self._items: dict[tuple[Process, int], str] = {}
        self._skews: dict[str, float] = {}
        self.standing = Standing(schema, self.expect)
        schema.on_commit, schema.on_grant = self._committed, self._granted

    def fail(self, what: str) -> None:
        """Notes a breach."""
        self.trace(f"VIOLATION {what}")
        self.violations.append(what)
        self._stop()

    def expect(self, holds: object, what: str) -> None:
        """Notes a breach where something does not hold."""
        if not holds:
            self.fail(what)

    def log(self, key: Key) -> list[events_pb2.RunEvent]:
        """The durable events of a run."""
        return self._parsed.get(key, [])

    def has_ended(self, key: Key) -> bool:
        """Whether its end is durable."""
        log = self.log(key)
        return bool(log) and log[-1].WhichOneof("payload") in TERMINAL

    def sub_runs(self) -> list[Key]:
        """The runs that others have made."""
        return [key for key, run in self._schema.runs.items() if run["parent_run_id"]]

    def key_of(self, run_id: str) -> Key:
        """Tenant and run; run ids are unique here."""
        return next((key for key in self._schema.runs if key[1] == run_id), ("", run_id))

    def sent(self, process: Process, path: str, message: Any) -> None:
        """A process hands a message to its transport."""
        if isinstance(message, state_pb2.AppendRequest):
            self._skews[process.name] = process.clock_skew
            for append in message.appends:
                self._senders.setdefault(append.append_id, process.name)
                if append.events:
                    # One without leaves nothing that could be looked for.
                    self._items[process, append.item_id] = append.append_id
        elif isinstance(message, state_pb2.FollowResponse):
            self._shown(message.deliveries)

    def answered(self, process: Process, result: state_pb2.AppendResult) -> None:
        """An executor hears what became of its append."""
        append_id = self._items.get((process, result.item_id))
        if append_id is None or result.repeated_key:
            return
        if result.status.code != code_pb2.OK:
            is_durable = any(event.append_id == append_id for log in self._parsed.values() for event in log)
            self.expect(not is_durable, f"append {append_id} is durable and refused: {result.status.message}")
            return
        first = self._answers.setdefault(append_id, (result.run_id, result.ordinal))
        self.expect(first == (result.run_id, result.ordinal), f"append {append_id} is answered twice, differently")
        key = self.key_of(result.run_id)
        is_durable = any(event.append_id == append_id for event in self.log(key))
        # A create that stands in line has no event.
        is_durable = is_durable or self._schema.runs.get(key, {}).get("append_id") == append_id
        self.expect(is_durable, f"append {append_id} to {result.run_id} is answered before it is durable")

    def published(self, deliveries: Iterable[state_pb2.Delivery]) -> None:
        """A state process tells the others."""
        self._shown(deliveries)

    def _granted(self, key: Key, epoch: int, executor_id: str) -> None:
        self.trace(f"db: {key[1][-4:]} leased to {executor_id} under epoch {epoch}")
        self._grants[key, epoch] = executor_id
        self.standing.granted(key, epoch)
        if epoch > 1:
            self.on_claim(executor_id)

    def _committed(self, key: Key, rows: list[Row], epoch: int) -> None:
        log = self._parsed.setdefault(key, [])
        sender = self._senders.get(rows[0]["append_id"]) if rows else None
        # Nobody's process carries a statement out, so that this is the clock of all.
        clock = time.time() + self._skews.get(sender or "", 0.0)
        for row in rows:
            event = events_pb2.RunEvent.FromString(row["event"])
            self.trace(f"db: {key[1][-4:]} #{row['seq']} {row['type']} epoch {epoch}")
            self.expect(row["seq"] == event.seq == len(log) + 1, f"{key[1]}: #{event.seq} follows #{len(log)}")
            self.expect(not log or log[-1].WhichOneof("payload") not in TERMINAL, f"{key[1]}: an event after its end")
            self.expect(event.append_id == row["append_id"], f"{key[1]} #{event.seq}: stored under another append id")
            again = log and any(known.append_id == event.append_id for known in log[: 1 - len(rows) or None])
            self.expect(not (again and row is rows[0]), f"{key[1]} #{event.seq}: an append is stored twice")
            self._check_payload(key, log, event)
            self.standing.committed(key, log, event, clock=clock)
            log.append(event)
        if self.has_ended(key):
            self.on_end()
        newest = max(known for run, known in self._grants if run == key)
        self.expect(epoch == newest, f"{key[1]}: an append of epoch {epoch} is taken, the holder's is {newest}")
        holder = self._grants[key, newest]
        self.expect(sender in (None, holder), f"{key[1]}: {sender} appends, {holder} is the holder")

    def _check_payload(self, key: Key, log: list[events_pb2.RunEvent], event: events_pb2.RunEvent) -> None:
        kind = event.WhichOneof("payload")
        if kind == "agent_thinking":
            ids = [call.call_id for call in event.agent_thinking.planned_calls]
            derived = [f"{key[1]}.{event.seq}.{index}" for index in range(len(ids))]
            self.expect(ids == derived, f"{key[1]} #{event.seq}: call ids {ids} are not of this place")
            steps = [known.agent_thinking.step for known in log if known.HasField("agent_thinking")]
            self.expect(event.agent_thinking.step == len(steps) + 1, f"{key[1]} #{event.seq}: a model step comes twice")
        if kind == "attempt_failed":
            self._check_attempt(key, log, event.attempt_failed)
        if kind in ("tool_executing", "tool_completed"):
            call_id = getattr(event, kind).call_id
            same = [known for known in log if known.WhichOneof("payload") == kind]
            is_new = all(getattr(known, kind).call_id != call_id for known in same)
            self.expect(is_new, f"{key[1]} #{event.seq}: {kind} of {call_id} comes twice")
            planned = [call.call_id for known in log for call in known.agent_thinking.planned_calls]
            self.expect(call_id in planned, f"{key[1]} #{event.seq}: {call_id} was never planned")

    def _check_attempt(self, key: Key, log: list[events_pb2.RunEvent], failed: events_pb2.AttemptFailed) -> None:
        """Attempts count up, are bounded, and are over with what they are attempts at."""
        subject = (failed.step, failed.call_id)
        earlier = [known.attempt_failed for known in log if known.HasField("attempt_failed")]
        numbers = [known.attempt for known in earlier if (known.step, known.call_id) == subject]
        self.expect(failed.attempt > max(numbers, default=0), f"{key[1]}: {subject} fails twice at one attempt")
        self.expect(len(numbers) + 1 < ATTEMPTS_MAX, f"{key[1]}: {subject} is tried too often")
        is_over = any(
            known.tool_completed.call_id == failed.call_id
            if failed.call_id
            else known.agent_thinking.step == failed.step
            for known in log
        )
        self.expect(not is_over, f"{key[1]}: {subject} is tried again after its end")

    def _shown(self, deliveries: Iterable[state_pb2.Delivery]) -> None:
        for delivery in deliveries:
            key = (delivery.tenant_id, delivery.run_id)
            log = self.log(key)
            if delivery.events:
                owner = self._schema.runs.get(key, {}).get("user_id")
                self.expect(owner == delivery.user_id, f"{key[1]}: a frame names {delivery.user_id}, it is {owner}'s")
            for event in delivery.events:
                if not 1 <= event.seq <= len(log):
                    self.fail(f"{key[1]} #{event.seq} leaves state before its commit")
                elif log[event.seq - 1] != event and not _is_public_view(event, log[event.seq - 1]):
                    self.fail(f"{key[1]} #{event.seq}: the frame is not the row")

    def model_called(self, executor_id: str, run_id: str, step: int) -> None:
        """An executor asks a model: that costs money."""
        key = self.key_of(run_id)
        self.trace(f"{executor_id}: model step {step} of {run_id[-4:]}")
        self.expect(key in self._schema.runs, f"{run_id}: a model is called before the run exists")
        done = [event.agent_thinking.step for event in self.log(key)]
        self._expect_holder(key, executor_id, what=f"model step {step}")
        self.standing.called(key, self.log(key), f"model step {step}")
        self.expect(step not in done, f"{run_id}: model step {step} is durable and made again")

    def tool_called(self, executor_id: str, call: dispatcher_pb2.ToolCall) -> None:
        """An executor decides to make a call."""
        run_id, effect = call.call_id.split(".")[0], call.tool.split(".")[0]
        key = self.key_of(run_id)
        self.trace(f"{executor_id}: calls {call.tool} {call.call_id[-8:]} attempt {call.attempt}")
        log = self.log(key)
        self._expect_holder(key, executor_id, what=call.call_id)
        self.standing.called(key, log, call.call_id)
        self.expect(call.effect == EFFECTS[effect], f"{call.call_id}: called with another effect class")
        done = any(event.tool_completed.call_id == call.call_id for event in log)
        self.expect(not done, f"{call.call_id}: a finished call is made again")
        intents = any(event.tool_executing.call_id == call.call_id for event in log)
        self.expect(intents or effect not in AFTER_INTENT, f"{call.call_id}: {effect}, called before its intent")
        failures = [event.attempt_failed for event in log if event.attempt_failed.call_id == call.call_id]
        is_due = not failures or failures[-1].retry_time.ToNanoseconds() <= time.time() * 1e9 + CLOCK_NS
        self.expect(is_due, f"{call.call_id}: made again before its time")
        self.expect(not self.has_ended(key), f"{call.call_id}: called after the run's end")

    def _expect_holder(self, key: Key, executor_id: str, *, what: str) -> None:
        holder = self._schema.held_by(key)
        self.expect(holder == executor_id, f"{key[1]}: {executor_id} makes {what}, the holder is {holder or 'nobody'}")

    def tool_reached(self, call: dispatcher_pb2.ToolCall) -> None:
        """A call has its effect. A keyed tool keeps its keys for ever."""
        effect = call.tool.split(".")[0]
        self.arrivals[call.call_id] += 1
        self.trace(f"worker: {call.tool} {call.call_id[-8:]} has its effect")
        if effect == "unsafe":
            leaves = self._leaves(call.call_id)
            self.expect(self.arrivals[call.call_id] <= 1 + leaves, f"{call.call_id}: unsafe, and made again unasked")
        run_id = call.call_id.split(".")[0]
        if effect == "keyed" and self.arrivals[call.call_id] == 1:
            self.effects[run_id, call.tool, call.arguments.decode()] += 1
            count = self.effects[run_id, call.tool, call.arguments.decode()]
            self.expect(count == 1, f"{run_id}: the keyed effect {call.tool} {call.arguments!r} happens {count} times")

    def _leaves(self, call_id: str) -> int:
        """How often a person gave leave to make a call once more."""
        log = self.log(self.key_of(call_id.split(".")[0]))
        asked = {event.approval_requested.approval_id for event in log if event.approval_requested.call_id == call_id}
        return sum(
            b"retry" in event.approval_resolved.data for event in log if event.approval_resolved.approval_id in asked
        )

    def saw(self, name: str, key: Key, *, seq: int, expected_seq: int) -> None:
        """A watcher is shown an event."""
        self.expect(seq == expected_seq, f"{name} sees #{seq} of {key[1]} where #{expected_seq} comes next")

    def saw_event(self, name: str, key: Key, *, event: EncodedEvent, expected_seq: int) -> None:
        """A watcher at the gateway is shown an event: it is the row's, in its place."""
        self.saw(name, key, seq=event.seq, expected_seq=expected_seq)
        log = self.log(key)
        row = encode(log[event.seq - 1]).payload if event.seq <= len(log) else b"{}"
        # Maps have no order.
        is_row = row == event.payload or orjson.loads(row) == orjson.loads(event.payload)
        self.expect(is_row, f"{name}: the event #{event.seq} of {key[1]} is not its row")


def _is_public_view(event: events_pb2.RunEvent, row: events_pb2.RunEvent) -> bool:
    """Whether it is the row less what only the platform may know."""
    public = events_pb2.RunEvent()
    public.CopyFrom(row)
    if public.HasField("agent_thinking"):
        public.agent_thinking.ClearField("provider_state")
    return public == event
