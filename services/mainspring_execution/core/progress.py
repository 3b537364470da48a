"""How far a run has come: the fold over its log. The same fold serves the live run and the one that is taken over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import orjson
from mainspring.v1 import events_pb2, types_pb2

from mainspring_execution.core.intrinsic import SIGNAL, is_intrinsic

_FAILED: Final = (types_pb2.TOOL_STATUS_ERROR, types_pb2.TOOL_STATUS_TIMED_OUT)


class Progress:
    """What a run's events so far add up to; `apply` takes the next event."""

    __slots__ = (
        "agent",
        "agent_first_step",
        "agent_version",
        "answers",
        "approvals",
        "attempts",
        "cache_hits",
        "call_failures",
        "copied_seq",
        "cost_usd",
        "ended",
        "failures",
        "input",
        "input_tokens",
        "intents",
        "last_event",
        "model_calls",
        "opened_ms",
        "outcomes",
        "output_tokens",
        "paused",
        "planned",
        "recoveries",
        "recoveries_in_a_row",
        "requests",
        "result",
        "retries",
        "retry_times",
        "seq",
        "signals",
        "source_run_id",
        "source_seq",
        "started_ms",
        "steps",
        "thoughts",
        "tool_calls",
        "tool_errors",
        "unmade",
        "waiting_ms",
        "waiting_since_ms",
    )

    def __init__(self) -> None:
        self.seq = 0
        self.last_event = ""
        self.started_ms = 0.0
        self.input = b""
        self.steps = 0
        self.thoughts: list[events_pb2.AgentThinking] = []
        self.planned: list[events_pb2.PlannedCall] = []
        self.intents: dict[str, events_pb2.ToolExecuting] = {}
        self.outcomes: dict[str, events_pb2.ToolCompleted] = {}
        self.attempts: dict[str, int] = {}
        # Of the model step that comes next: its failed attempts.
        self.failures: list[events_pb2.AttemptFailed] = []
        # Of each call that has failed: why it did last.
        self.call_failures: dict[str, types_pb2.RunError] = {}
        # When a call, or under "" the next model step, is tried again, in seconds since 1970; also after it was.
        self.retry_times: dict[str, float] = {}
        self.retries = 0
        self.result = b""
        self.input_tokens = 0
        self.output_tokens = 0
        self.cost_usd = 0.0
        # What was done in this run; what a fork has taken from another one's log counts there.
        self.model_calls = 0
        self.tool_calls = 0
        self.tool_errors = 0
        self.cache_hits = 0
        self.waiting_ms = 0.0
        # Since when it stands still, in milliseconds since 1970; 0: it does not.
        self.waiting_since_ms = 0.0
        self.recoveries = 0
        self.recoveries_in_a_row = 0
        # Who drives the run since which model step, where it was handed over; empty: the agent it was started with.
        self.agent = ""
        self.agent_version = ""
        self.agent_first_step = 1
        # Whose steps up to which event this run begins with; 0: none, or it has gone on since.
        self.source_run_id = ""
        self.source_seq = 0
        self.copied_seq = 0
        # Sub-runs by call id, open, of which it is not known that they were made: no run parks before they are.
        self.unmade: dict[str, str] = {}
        # Of the calls that only wait: when each began, in milliseconds since 1970.
        self.opened_ms: dict[str, float] = {}
        # By call id: the question that is open, and the answer to the last one.
        self.approvals: dict[str, events_pb2.ApprovalRequested] = {}
        self.answers: dict[str, events_pb2.ApprovalResolved] = {}
        # Signals that no call has taken, in the order of their coming.
        self.signals: list[events_pb2.SignalReceived] = []
        # Requests that the log has recorded: one that comes again has been done.
        self.requests: set[str] = set()
        self.paused = False
        self.ended = False

    @property
    def started(self) -> bool:
        """Whether the run has its agent_started."""
        return self.seq > 0

    def apply(self, event: events_pb2.RunEvent) -> None:
        """Takes the event that follows in the log."""
        if event.seq != self.seq + 1:
            raise ValueError(f"run {event.run_id}: event {event.seq} cannot follow event {self.seq}")
        self.seq = event.seq
        kind = event.WhichOneof("payload")
        self.last_event = kind or ""
        if self.waiting_since_ms:
            self.end_wait(_milliseconds(event))
        if kind == "run_recovered":
            self._recover(event.run_recovered)
            return
        self.recoveries_in_a_row = 0
        if kind == "agent_thinking":
            self._think(event.agent_thinking, is_own=not event.source_seq)
        elif kind == "tool_executing":
            self._intend(event)
        elif kind == "tool_completed":
            self._complete(event.tool_completed, is_own=not event.source_seq)
        elif kind == "agent_started":
            self.input = event.agent_started.input
            self.started_ms = _milliseconds(event)
            self.source_run_id, self.source_seq = event.agent_started.source_run_id, event.agent_started.source_seq
        elif kind in ("agent_completed", "agent_failed", "agent_cancelled", "agent_timed_out"):
            self.ended = True
        elif not self._apply_control(event, self.last_event) and not event.safe_to_skip:
            raise ValueError(f"run {event.run_id}: this release does not know what event {event.seq} means")
        if event.source_seq:
            self.copied_seq = event.source_seq

    def end_wait(self, time_ms: float) -> None:
        """The run goes on at this time; a wait counts from its event to the next one, or to when it was taken up."""
        self.waiting_ms += max(0.0, time_ms - self.waiting_since_ms)
        self.waiting_since_ms = 0.0

    def open_calls(self) -> list[events_pb2.PlannedCall]:
        """The planned calls that have no outcome, in the model's order."""
        if len(self.outcomes) == len(self.planned):
            return []
        return [call for call in self.planned if call.call_id not in self.outcomes]

    def begun_calls(self) -> list[str]:
        """Calls that were begun and have no outcome."""
        return [call_id for call_id in self.intents if call_id not in self.outcomes]

    def sub_runs(self) -> list[str]:
        """The sub-runs of open calls."""
        return [run_id for call_id in self.begun_calls() if (run_id := self.intents[call_id].sub_run_id)]

    def lost_calls(self) -> list[str]:
        """Those of them that somebody else was asked to make: what a takeover finds."""
        return [call_id for call_id in self.begun_calls() if not is_intrinsic(self.intents[call_id].tool)]

    def _think(self, thinking: events_pb2.AgentThinking, *, is_own: bool) -> None:
        """What a fork has taken from another run's log was paid there."""
        self.steps = thinking.step
        self.thoughts.append(thinking)
        if self.failures:
            self.failures = []
            self.retry_times.pop("", None)
        self.planned.extend(thinking.planned_calls)
        self.result = thinking.result
        if is_own:
            self.source_seq = 0
            self.model_calls += 1
            self.use(thinking.usage)

    def use(self, usage: types_pb2.Usage) -> None:
        """Counts what an answer has used."""
        self.input_tokens += usage.input_tokens
        self.output_tokens += usage.output_tokens
        self.cost_usd += usage.cost_usd

    def _intend(self, event: events_pb2.RunEvent) -> None:
        intent = event.tool_executing
        self.intents[intent.call_id] = intent
        self.attempts[intent.call_id] = intent.attempt
        if intent.sub_run_id:
            self.unmade[intent.call_id] = intent.sub_run_id
        if is_intrinsic(intent.tool):
            self.opened_ms[intent.call_id] = _milliseconds(event)

    def _complete(self, outcome: events_pb2.ToolCompleted, *, is_own: bool) -> None:
        self.outcomes[outcome.call_id] = outcome
        if self.unmade:
            self.unmade.pop(outcome.call_id, None)
        if is_own:
            self.tool_calls += 1
            self.tool_errors += outcome.status in _FAILED
            self.cache_hits += outcome.cached
        if self.retry_times:
            self.retry_times.pop(outcome.call_id, None)
        if outcome.tool == SIGNAL and outcome.status == types_pb2.TOOL_STATUS_OK:
            name = orjson.loads(outcome.result)["name"]
            taken = next((signal for signal in self.signals if signal.name == name), None)
            if taken is not None:
                self.signals.remove(taken)

    def _fail(self, failed: events_pb2.AttemptFailed) -> None:
        self.retries += 1
        self.source_seq = 0
        self.retry_times[failed.call_id] = failed.retry_time.ToNanoseconds() / 1e9
        if failed.call_id:
            self.attempts[failed.call_id] = failed.attempt + 1
            self.call_failures[failed.call_id] = failed.error
        else:
            self.failures.append(failed)
            self.use(failed.usage)

    def _recover(self, recovered: events_pb2.RunRecovered) -> None:
        self.recoveries += 1
        if recovered.handed_back:
            return
        self.recoveries_in_a_row += 1
        for call_id in recovered.lost_calls:
            self.attempts[call_id] = self.attempts.get(call_id, 0) + 1
            # Leave to make a call again holds for one attempt, and that may have been it.
            self.answers.pop(call_id, None)

    def _apply_control(self, event: events_pb2.RunEvent, kind: str) -> bool:
        """Takes what people and time did to the run; False: it was nothing of theirs."""
        if kind == "attempt_failed":
            self._fail(event.attempt_failed)
        elif kind == "signal_received":
            self.signals.append(event.signal_received)
            self.requests.add(event.signal_received.request_id)
        elif kind == "approval_requested":
            asked = event.approval_requested
            self.approvals[asked.call_id] = asked
            self.answers.pop(asked.call_id, None)
        elif kind == "approval_resolved":
            self._resolve(event.approval_resolved)
        elif kind == "agent_paused":
            self.paused = True
            self.waiting_since_ms = _milliseconds(event)
            self.requests.add(event.agent_paused.request_id)
        elif kind == "agent_resumed":
            self.paused = False
            self.requests.add(event.agent_resumed.request_id)
        elif kind == "agent_handed_off":
            self.agent, self.agent_version = event.agent_handed_off.to_agent, event.agent_handed_off.to_version
            self.agent_first_step = self.steps + 1
        elif kind == "agent_waiting":
            self.unmade.clear()
            self.waiting_since_ms = _milliseconds(event)
        else:
            return False
        return True

    def _resolve(self, resolved: events_pb2.ApprovalResolved) -> None:
        for call_id, asked in list(self.approvals.items()):
            if asked.approval_id == resolved.approval_id:
                del self.approvals[call_id]
                self.answers[call_id] = resolved


def fold(events: Iterable[events_pb2.RunEvent]) -> Progress:
    """Adds a log up, from its first event."""
    progress = Progress()
    for event in events:
        progress.apply(event)
    return progress


def _milliseconds(event: events_pb2.RunEvent) -> float:
    return event.event_time.seconds * 1e3 + event.event_time.nanos / 1e6
