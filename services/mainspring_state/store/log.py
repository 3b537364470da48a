"""The log's one writer: how a batch of appends becomes one statement, and what the database says about each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import asyncpg
from google.protobuf.timestamp_pb2 import Timestamp
from mainspring.v1 import state_pb2, types_pb2
from mainspring_kit import postgres

from mainspring_state.core.append import QUEUED, RUNNING, Entry
from mainspring_state.store import extras
from mainspring_state.store.rows import to_datetime

if TYPE_CHECKING:
    from asyncpg.prepared_stmt import PreparedStatement

# How long a commit, and all others behind it, waits for a row that somebody else has locked; and each part of the
# commit, once it is looked for which run's row that is.
LOCK_SECONDS_MAX: Final = 1.0
SEARCH_LOCK_SECONDS_MAX: Final = 0.2

_SQL: Final = postgres.load_queries("mainspring_state")
_INTERRUPTION: Final = state_pb2.RunInput(
    cancel=state_pb2.CancelInput(reason="A newer run of the session took its place.")
).SerializeToString()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one append. `reason` is empty when it was committed just now, else the database's word."""

    reason: str
    run_id: str
    user_id: str
    state: int
    last_seq: int
    ordinal: int
    events: list[bytes]

    @property
    def is_new(self) -> bool:
        """Committed by this very statement."""
        return not self.reason

    @property
    def is_ok(self) -> bool:
        """Durable: now or before."""
        return self.reason in ("", "repeated", "key_repeated")


@dataclass(frozen=True, slots=True)
class Committed:
    """What became of a batch. `became_ready`: a run is claimable by it; `told`: new inputs with their runs' holders."""

    outcomes: list[Outcome]
    became_ready: bool
    told: list[tuple[str, state_pb2.RunInput]]


class Batch:
    """A batch of entries, stamped at one moment, as one statement's arguments.

    In the database's order: creates of roots and of sub-runs, others, terminal ones.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = entries
        # Locks are taken in the order of runs, so that two state processes do not wait for each other.
        order = sorted(range(len(entries)), key=lambda k: (_group(entries[k]), entries[k].run_key))
        self._order = order
        self._events = [[event.SerializeToString() for event in entries[k].append.events] for k in order]
        self.arguments = self._encode([entries[k] for k in order])

    def outcomes(self, row: asyncpg.Record) -> list[Outcome]:
        """What the statement's row says about each entry, in the order in which they were given."""
        found: list[Outcome | None] = [None] * len(self._entries)
        if row["made"]:
            for i, is_running, ordinal in zip(row["made"], row["made_running"], row["made_ordinals"], strict=True):
                found[self._order[i - 1]] = self._made(i, is_running=is_running, ordinal=ordinal)
        if row["hit"]:
            hits = zip(row["hit"], row["hit_users"], row["hit_ordinals"], row["hit_states"], strict=True)
            for i, user_id, ordinal, state in hits:
                found[self._order[i - 1]] = self._hit(i, user_id=user_id, ordinal=ordinal, state=state)
        if row["missed"]:
            columns = ("missed", "missed_reasons", "missed_runs", "missed_states", "missed_seqs", "missed_ordinals")
            for i, reason, run_id, state, last_seq, ordinal in zip(*(row[name] for name in columns), strict=True):
                found[self._order[i - 1]] = Outcome(reason, str(run_id), "", state, last_seq, ordinal, [])
        return [outcome for outcome in found if outcome is not None]

    def told(self, row: asyncpg.Record) -> list[tuple[str, state_pb2.RunInput]]:
        """Inputs that the statement made for runs that somebody holds, each with the holder."""
        if not row["told_holders"]:
            return []
        columns = ("told_holders", "told_tenants", "told_users", "told_runs", "told_requests", "told_payloads")
        told = []
        for holder, tenant_id, user_id, run_id, request_id, payload in zip(
            *(row[name] for name in columns), strict=True
        ):
            run_input = state_pb2.RunInput.FromString(payload)
            run_input.request_id, run_input.tenant_id, run_input.run_id = request_id, tenant_id, str(run_id)
            run_input.requested_by = user_id
            told.append((holder, run_input))
        return told

    def _made(self, i: int, *, is_running: bool, ordinal: int) -> Outcome:
        append = self._entries[self._order[i - 1]].append
        events = [self._events[i - 1][0] + _ordinal_field(ordinal)] if is_running else []
        state = RUNNING if is_running else QUEUED
        return Outcome("", append.run_id, append.create.user_id, state, len(events), ordinal, events)

    def _hit(self, i: int, *, user_id: str, ordinal: int, state: int) -> Outcome:
        entry, events = self._entries[self._order[i - 1]], self._events[i - 1]
        if "agent_started" in entry.types:
            events = [events[0] + _ordinal_field(ordinal), *events[1:]]
        last_seq = entry.append.expected_seq + len(events)
        return Outcome("", entry.append.run_id, user_id, state, last_seq, ordinal, events)

    def _encode(self, entries: list[Entry]) -> list[Any]:
        """Any: each argument has the type of its parameter in the migration."""
        appends = [entry.append for entry in entries]
        creates = [append.create for append in appends if append.HasField("create")]
        endings = [entry.ending for entry in entries if entry.ending is not None]
        firsts, lasts, count = [], [], 0
        for events in self._events:
            firsts.append(count + 1)
            count += len(events)
            lasts.append(count)
        consumed = [(i, request) for i, append in enumerate(appends, 1) for request in append.consumed_request_ids]
        keys = [create.idempotency_key for create in creates]
        moment = next((append.events[0].event_time for append in appends if append.events), Timestamp())
        return [
            [append.tenant_id for append in appends],
            [append.run_id for append in appends],
            [append.append_id for append in appends],
            [append.expected_seq for append in appends],
            [append.epoch for append in appends],
            [entry.from_states for entry in entries],
            [entry.to_state for entry in entries],
            [entry.is_progress for entry in entries],
            firsts,
            lasts,
            [name for entry in entries for name in entry.types],
            [event for events in self._events for event in events],
            to_datetime(moment),
            len(creates),
            [create.user_id for create in creates],
            [create.session_id for create in creates],
            [create.policy or types_pb2.SESSION_POLICY_ENQUEUE for create in creates],
            [create.agent for create in creates],
            [create.agent_version for create in creates],
            [create.input for create in creates],
            keys if any(keys) else [],
            [create.request_hash for create in creates],
            [create.executor_id for create in creates],
            [to_datetime(create.deadline) if create.HasField("deadline") else None for create in creates],
            [create.trace_id for create in creates],
            len(entries) - len(endings) + 1,
            [ending.result for ending in endings],
            [ending.error for ending in endings],
            [ending.stages for ending in endings],
            [ending.usage for ending in endings],
            [i for i, _ in consumed],
            [request for _, request in consumed],
            _INTERRUPTION,
            *extras.of_creates(creates),
            *extras.of_releases(appends),
            *extras.of_metrics([entry.append.metrics for entry in entries if entry.ending is not None]),
            *extras.of_approvals(entries),
            *extras.of_lines(creates, moment),
        ]


class LogWriter:
    """The dedicated connection on which batches are committed, one at a time."""

    def __init__(self, connection: asyncpg.Connection[asyncpg.Record], statement: PreparedStatement[Any]) -> None:
        # Any: the record class, which asyncpg's stubs make generic.
        self._connection = connection
        self._statement = statement

    @classmethod
    async def open(cls, url: str) -> LogWriter:
        """Connects and prepares the statement."""
        connection = await postgres.connect_one(url)
        try:
            writer = cls(connection, await connection.prepare(_SQL["append"]))
            await writer.wait_for_locks(LOCK_SECONDS_MAX)
        except BaseException:
            connection.terminate()
            raise
        return writer

    async def wait_for_locks(self, seconds: float) -> None:
        """How long a commit waits for a locked row from now on."""
        await self._connection.execute(f"SET lock_timeout = {int(seconds * 1_000)}")

    async def commit(self, batch: Batch) -> Committed:
        """Commits a batch durably."""
        # An array costs the function something, however empty; no array costs it nothing.
        row = await self._statement.fetchrow(*(None if value == [] else value for value in batch.arguments))
        assert row is not None, "the function returns one row"
        return Committed(batch.outcomes(row), row["became_ready"], batch.told(row))

    def close(self) -> None:
        """Gives the connection up, whatever it is doing."""
        self._connection.terminate()


def is_conflict(error: asyncpg.PostgresError) -> bool:
    """Whether another process was quicker: a deadlock, or a run, key or lease that appeared in mid-statement.

    The whole batch goes again and meets what it ran into as what was there before.
    """
    return isinstance(error, asyncpg.UniqueViolationError) or str(error.sqlstate)[:2] in ("40", "55")


def is_shortage(error: asyncpg.PostgresError) -> bool:
    """Whether the database lacks something that it may have again later: disk, memory, connections, leave to write."""
    return str(error.sqlstate)[:2] in ("53", "58") or isinstance(error, asyncpg.ReadOnlySQLTransactionError)


def _group(entry: Entry) -> int:
    if entry.is_create:
        return 1 if entry.append.create.parent_run_id else 0
    return 2 if entry.ending is None else 3


def _ordinal_field(ordinal: int) -> bytes:
    """RunEvent.agent_started.ordinal as the database appends it (`state.ordinal_field`)."""
    field = b"\x18"
    while ordinal > 127:
        field += bytes([ordinal & 127 | 128])
        ordinal >>= 7
    field += bytes([ordinal])
    return b"\xa2\x01" + bytes([len(field)]) + field
