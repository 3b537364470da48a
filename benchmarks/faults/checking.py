"""The checker: what was told, what is stored and what has happened, held against each other run by run."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import asyncpg
from mainspring.v1 import events_pb2, types_pb2
from mainspring_gateway.core.events import encode

from benchmarks.faults.client import Ledger
from benchmarks.faults.runs import COUNT_TOOL, TERMINAL, Run, Seen

PAGE_ROWS: Final = 1_000
_RUNS: Final = "SELECT run_id::text, user_id, last_seq FROM state.runs WHERE tenant_id = $1 AND user_id = ANY ($2)"
_EVENTS: Final = """
SELECT run_id::text, seq, type, event FROM state.events
WHERE tenant_id = $1 AND user_id = ANY ($2) ORDER BY run_id, seq"""


@dataclass(frozen=True, slots=True)
class EventRow:
    """A row of the log: its columns, and the serialized RunEvent."""

    run_id: str
    seq: int
    type: str
    event: bytes


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run's own row."""

    user_id: str
    last_seq: int


class Checker:
    """Judges what the drill has left. Breaches go to the ledger: lost, doubled, gaps, foreign, mismatched."""

    def __init__(
        self, ledger: Ledger, *, runs: Sequence[Run], rows: Mapping[str, RunRow], effects: Counter[str]
    ) -> None:
        """`rows`: all rows of runs, by run id; `effects`: how many lines each call id has in the files."""
        self.refused = 0
        self.recovered = 0
        self._ledger = ledger
        self._runs = {run.run_id: run for run in runs if run.run_id}
        self._rows = rows
        self._effects = effects
        self._intended: set[str] = set()
        for run in runs:
            self._check_start(run)
        for run_id in rows.keys() - self._runs.keys():
            ledger.blame("doubled", f"run {run_id} is stored, and no start was answered with it")

    def check_log(self, run_id: str, log: Sequence[EventRow]) -> None:
        """Judges the log of one run. Every stored run has to be given once, also one without rows."""
        run, last_seq = self._runs.get(run_id), self._rows[run_id].last_seq
        events = [events_pb2.RunEvent.FromString(row.event) for row in log]
        if [row.seq for row in log] != list(range(1, last_seq + 1)):
            self._ledger.blame("gaps", f"run {run_id} is at {last_seq} with {[row.seq for row in log]}")
        kinds = [row.type for row in log]
        ends = [kind for kind in kinds if kind in TERMINAL]
        if len(ends) != 1 or kinds[-1:] != ends or kinds.count("agent_started") != 1 or kinds[0] != "agent_started":
            self._ledger.blame("lost" if not ends else "doubled", f"the log of run {run_id} is {kinds}")
        self.recovered += kinds.count("run_recovered")
        for row, event in zip(log, events, strict=True):
            if (event.run_id, event.seq, event.WhichOneof("payload")) != (row.run_id, row.seq, row.type):
                self._ledger.blame("mismatched", f"the columns of event {row.seq} of run {run_id} are not the event's")
        if run is not None:
            self._check_frames(run, events)
            self._check_end(run, events)
        self._check_effects(run, events)

    def check_foreign(self, user: str, logs: Mapping[str, Seen]) -> None:
        """Judges which runs a user's sockets have shown."""
        for run_id in logs:
            row = self._rows.get(run_id)
            if row is None or row.user_id != user:
                self._ledger.blame("foreign", f"{user} saw run {run_id}")

    def finish(self) -> None:
        """Judges what is left when all logs were given: effects that no log knows of, effects that came twice."""
        for call_id, count in self._effects.items():
            if count > 1:
                self._ledger.blame("doubled", f"call {call_id} had its effect {count} times")
            if call_id not in self._intended:
                self._ledger.blame("doubled", f"call {call_id} had an effect that no log intends")

    def _check_start(self, run: Run) -> None:
        if run.refusal:
            self.refused += run.refusal == "EVENT_REFUSED"
            if run.refusal != "EVENT_REFUSED":
                self._ledger.blame("lost", f"the start {run.key} was refused with {run.refusal}")
        elif not run.run_id:
            self._ledger.blame("lost", f"the start {run.key} was never answered")
        elif run.run_id not in self._rows:
            self._ledger.blame("lost", f"run {run.run_id} was acknowledged and is not stored")
        elif not run.seen.has_ended:
            self._ledger.blame("lost", f"the end of run {run.run_id} was not shown")

    def _check_frames(self, run: Run, events: Sequence[events_pb2.RunEvent]) -> None:
        digests = [hash(encode(event).payload) for event in events]
        for seq, (told, stored) in enumerate(zip(run.seen.digests, digests, strict=False), 1):
            if told != stored:
                self._ledger.blame("mismatched", f"event {seq} of run {run.run_id} was not shown as it is stored")
        if run.seen.last_seq != len(events):
            self._ledger.blame("gaps", f"run {run.run_id} has {len(events)} events, {run.seen.last_seq} were shown")

    def _check_end(self, run: Run, events: Sequence[events_pb2.RunEvent]) -> None:
        """Completed, unless the database refused a value of it."""
        if not events or events[-1].HasField("agent_completed"):
            return
        reason = events[-1].agent_failed.error.reason
        if run.refused_at and reason == "EVENT_REFUSED":
            self.refused += 1
        else:
            error = events[-1].agent_failed.error
            kind = events[-1].WhichOneof("payload")
            self._ledger.blame("lost", f"run {run.run_id} ended with {kind}: {error.reason}: {error.message}")

    def _check_effects(self, run: Run | None, events: Sequence[events_pb2.RunEvent]) -> None:
        self._intended |= {event.tool_executing.call_id for event in events if event.tool_executing.tool == COUNT_TOOL}
        done = [
            event.tool_completed.call_id
            for event in events
            if event.tool_completed.tool == COUNT_TOOL and event.tool_completed.status == types_pb2.TOOL_STATUS_OK
        ]
        for call_id in done:
            if call_id not in self._effects:
                self._ledger.blame("lost", f"call {call_id} is told of as done and had no effect")
        is_completed = bool(events) and events[-1].HasField("agent_completed")
        if run is not None and is_completed and len(set(done)) != run.counts:
            self._ledger.blame("lost", f"run {run.run_id} completed with {len(set(done))} of {run.counts} keyed calls")


def read_effects(folder: Path) -> Counter[str]:
    """How many lines each call id has in the files of a folder."""
    lines = [line for path in folder.iterdir() for line in path.read_text(encoding="utf-8").splitlines()]
    return Counter(line.split()[1] for line in lines)


async def read_runs(connection: asyncpg.Connection[asyncpg.Record], tenant: str, users: list[str]) -> dict[str, RunRow]:
    """The rows of these users' runs, by run id."""
    rows = await connection.fetch(_RUNS, tenant, users)
    return {row["run_id"]: RunRow(row["user_id"], row["last_seq"]) for row in rows}


async def read_logs(
    connection: asyncpg.Connection[asyncpg.Record], tenant: str, users: list[str]
) -> AsyncIterator[tuple[str, list[EventRow]]]:
    """The logs of these users' runs, one after the other."""
    log: list[EventRow] = []
    async with connection.transaction():
        async for row in connection.cursor(_EVENTS, tenant, users, prefetch=PAGE_ROWS):
            found = EventRow(row["run_id"], row["seq"], row["type"], row["event"])
            if log and log[0].run_id != found.run_id:
                yield log[0].run_id, log
                log = []
            log.append(found)
    if log:
        yield log[0].run_id, log


def missing_logs(rows: Iterable[str], seen: set[str]) -> list[str]:
    """Runs that are stored without a log."""
    return sorted(set(rows) - seen)
