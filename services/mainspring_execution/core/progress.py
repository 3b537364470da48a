"""How far a run has come: the fold over its log. The same fold serves the live run and the one that is taken over."""

from __future__ import annotations

from collections.abc import Iterable

from mainspring.v1 import events_pb2


class Progress:
    """What a run's events so far add up to; `apply` takes the next event."""

    __slots__ = (
        "attempts",
        "cost_usd",
        "ended",
        "failures",
        "input",
        "input_tokens",
        "intents",
        "last_event",
        "outcomes",
        "output_tokens",
        "planned",
        "recoveries",
        "recoveries_in_a_row",
        "result",
        "retries",
        "retry_times",
        "seq",
        "started_ms",
        "steps",
        "thoughts",
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
        # When a call, or under "" the next model step, is tried again, in seconds since 1970; also after it was.
        self.retry_times: dict[str, float] = {}
        self.retries = 0
        self.result = b""
        self.input_tokens = 0
        self.output_tokens = 0
        self.cost_usd = 0.0
        self.recoveries = 0
        self.recoveries_in_a_row = 0
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
        if kind == "run_recovered":
            self._recover(event.run_recovered)
            return
        self.recoveries_in_a_row = 0
        if kind == "agent_thinking":
            self._think(event.agent_thinking)
        elif kind == "tool_executing":
            intent = event.tool_executing
            self.intents[intent.call_id] = intent
            self.attempts[intent.call_id] = intent.attempt
        elif kind == "tool_completed":
            self.outcomes[event.tool_completed.call_id] = event.tool_completed
            if self.retry_times:
                self.retry_times.pop(event.tool_completed.call_id, None)
        elif kind == "attempt_failed":
            self._fail(event.attempt_failed)
        elif kind == "agent_started":
            self.input = event.agent_started.input
            self.started_ms = event.event_time.seconds * 1e3 + event.event_time.nanos / 1e6
        elif kind in ("agent_completed", "agent_failed", "agent_cancelled", "agent_timed_out"):
            self.ended = True
        elif not event.safe_to_skip:
            raise ValueError(f"run {event.run_id}: this release does not know what event {event.seq} means")

    def open_calls(self) -> list[events_pb2.PlannedCall]:
        """The planned calls that have no outcome, in the model's order."""
        if len(self.outcomes) == len(self.planned):
            return []
        return [call for call in self.planned if call.call_id not in self.outcomes]

    def lost_calls(self) -> list[str]:
        """Calls that were begun and have no outcome: what a takeover finds."""
        return [call_id for call_id in self.intents if call_id not in self.outcomes]

    def _think(self, thinking: events_pb2.AgentThinking) -> None:
        self.steps = thinking.step
        self.thoughts.append(thinking)
        if self.failures:
            self.failures = []
            self.retry_times.pop("", None)
        self.planned.extend(thinking.planned_calls)
        self.result = thinking.result
        self.input_tokens += thinking.usage.input_tokens
        self.output_tokens += thinking.usage.output_tokens
        self.cost_usd += thinking.usage.cost_usd

    def _fail(self, failed: events_pb2.AttemptFailed) -> None:
        self.retries += 1
        self.retry_times[failed.call_id] = failed.retry_time.ToNanoseconds() / 1e9
        if failed.call_id:
            self.attempts[failed.call_id] = failed.attempt + 1
        else:
            self.failures.append(failed)

    def _recover(self, recovered: events_pb2.RunRecovered) -> None:
        self.recoveries += 1
        self.recoveries_in_a_row += 1
        for call_id in recovered.lost_calls:
            self.attempts[call_id] = self.attempts.get(call_id, 0) + 1


def fold(events: Iterable[events_pb2.RunEvent]) -> Progress:
    """Adds a log up, from its first event."""
    progress = Progress()
    for event in events:
        progress.apply(event)
    return progress
