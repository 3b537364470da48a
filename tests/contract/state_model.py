"""The model of state's database (`tests.simulation.tables`) as a state process drives it, and what is real."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import asyncpg
from mainspring.v1 import events_pb2, state_pb2
from mainspring_kit.errors import MainspringError
from mainspring_state.core.append import Entry, check, stamp
from mainspring_state.core.backlog import Backlog
from mainspring_state.core.refusals import refusal, stale
from mainspring_state.store.log import Batch, Outcome

from tests.simulation.leasing import Schema

# Any: rows of tables, as tuples.
Rows = list[tuple[Any, ...]]
QUERIES: Final = {
    "runs": """SELECT run_id::text, append_id::text, ordinal, last_seq, epoch, takeovers, stalled, state, user_id,
        session_id, parent_run_id::text, root_run_id::text, parent_call_id, depth, attempt, priority,
        source_run_id::text, start_time IS NULL, end_time IS NULL, error IS NULL, result
        FROM state.runs WHERE tenant_id = $1""",
    "events": "SELECT run_id::text, seq, append_id::text, user_id, type, event FROM state.events WHERE tenant_id = $1",
    "sessions": """SELECT user_id, session_id, policy, run_count, head_run_id::text, last_run_id::text, waiting
        FROM state.sessions WHERE tenant_id = $1""",
    "queued": "SELECT user_id, session_id, ordinal, run_id::text FROM state.queued WHERE tenant_id = $1",
    "ready": "SELECT run_id::text, in_line FROM state.ready WHERE tenant_id = $1",
    "shares": "SELECT queued, weight FROM state.shares WHERE tenant_id = $1",
    "caps": "SELECT scope, cap, used FROM state.caps WHERE tenant_id = $1",
    "slots": "SELECT run_id::text, scopes FROM state.slots WHERE tenant_id = $1",
    "cap_line": "SELECT run_id::text, priority, scopes FROM state.cap_line WHERE tenant_id = $1",
    "leases": "SELECT run_id::text, executor_id, claim_seq, handed_back FROM state.leases WHERE tenant_id = $1",
    "inputs": """SELECT run_id::text, request_id, requested_by, consumed_seq, user_id, kind, payload
        FROM state.inputs WHERE tenant_id = $1""",
    "approvals": """SELECT run_id::text, seq, kind, role, expires_time, call_id, decision, answered_by, data
        FROM state.approvals WHERE tenant_id = $1""",
    "metrics": """SELECT run_id::text, state, model_calls, tool_calls, tool_errors, cache_hits, retries, waiting_ms
        FROM state.runs WHERE tenant_id = $1 AND state >= 5""",
    "webhooks": "SELECT run_id::text, url, credential FROM state.webhooks WHERE tenant_id = $1",
    "keys": """SELECT user_id, idempotency_key, run_id::text, request_hash
        FROM state.idempotency_keys WHERE tenant_id = $1""",
}

RUN_COLUMNS: Final = (
    "run_id", "append_id", "ordinal", "last_seq", "epoch", "takeovers", "stalled", "state", "user_id", "session_id",
    "parent_run_id", "root_run_id", "parent_call_id", "depth", "attempt", "priority", "source_run_id",
)  # fmt: skip
APPROVAL_COLUMNS: Final = ("kind", "role", "expires_time", "call_id", "decision", "answered_by", "data")
RUN_UNSET: Final = ("start_time", "end_time", "error")


@dataclass(frozen=True, slots=True)
class Said:
    """What an executor is told of an append; `reason` is empty when it is OK."""

    reason: str
    run_id: str
    state: int
    ordinal: int
    last_seq: int
    repeated_key: bool


@dataclass(frozen=True, slots=True)
class _Waiting:
    entry: Entry
    place: int


class ModelState:
    """Answers frames of appends as the committer does, over the model instead of PostgreSQL."""

    def __init__(self) -> None:
        self.schema = Schema(time.time)

    def append(self, appends: Sequence[state_pb2.Append]) -> list[Said]:
        """What one frame's appends are answered."""
        backlog: Backlog[_Waiting] = Backlog(items_max=1_000, bytes_max=1 << 30)
        answers: dict[int, Said] = {}
        for place, append in enumerate(appends):
            try:
                backlog.add(_Waiting(check(append), place))
            except MainspringError as error:
                answers[place] = _refused(append, error)
        while backlog:
            waitings = backlog.take()
            for waiting in waitings:
                stamp(waiting.entry, seconds=int(time.time()), nanos=0)
            batch = Batch([waiting.entry for waiting in waitings])
            outcomes = batch.outcomes(cast(asyncpg.Record, self.schema.append(*batch.arguments)))
            for waiting, outcome in zip(waitings, outcomes, strict=True):
                answers[waiting.place] = _said(waiting.entry, outcome)
                if outcome.reason == "stale":
                    for follower in backlog.drop_successors(waiting.entry):
                        answers[follower.place] = _refused(follower.entry.append, stale(follower.entry))
        return [answers[place] for place in range(len(appends))]

    def tables(self) -> dict[str, Rows]:
        """What the model holds, as the queries show it."""
        schema = self.schema
        return {
            "runs": [
                (*[run[name] for name in RUN_COLUMNS], *[run[name] is None for name in RUN_UNSET], run["result"])
                for run in schema.runs.values()
            ],
            "events": [
                (key[1], row["seq"], row["append_id"], row["user_id"], row["type"], _timeless(row["event"]))
                for key, rows in schema.events.items()
                for row in rows
            ],
            "sessions": [
                (*key[1:], row["policy"], row["run_count"], row["head_run_id"], row["last_run_id"], row["waiting"])
                for key, row in schema.sessions.items()
            ],
            "queued": [
                (*key[1:], ordinal, run_id) for key, line in schema.queued.items() for ordinal, run_id in line.items()
            ],
            "ready": [(key[1], key in schema.in_line) for key in schema.ready],
            "shares": [(share["queued"], share["weight"]) for share in schema.shares.values()],
            "caps": [(key[1], *row) for key, row in schema.caps.items()],
            "slots": [(key[1], scopes) for key, scopes in schema.slots.items()],
            "cap_line": [
                (key[1], schema.runs[key]["priority"], [scope for scope, _ in schema.runs[key]["caps"]])
                for key in schema.cap_line
            ],
            "leases": [
                (key[1], row["executor_id"], row["claim_seq"], row["handed_back"]) for key, row in schema.leases.items()
            ],
            "inputs": [
                (
                    key[1],
                    *(row[name] for name in ("request_id", "requested_by", "consumed_seq")),
                    schema.runs[key]["user_id"],
                    row["kind"],
                    row["payload"],
                )
                for key, inputs in schema.inputs.items()
                for row in inputs.values()
            ],
            "approvals": [
                (key[1], seq, *(row[name] for name in APPROVAL_COLUMNS))
                for key, rows in schema.approvals.items()
                for seq, row in rows.items()
            ],
            "metrics": [(key[1], *row.values()) for key, row in schema.metrics.items()],
            "webhooks": [(key[1], *row) for key, row in schema.webhooks.items()],
            "keys": [(*key[1:], *row) for key, row in schema.keys.items()],
        }


async def real_tables(connection: asyncpg.Connection[asyncpg.Record], tenant_id: str) -> dict[str, Rows]:
    """What the database holds of a tenant."""
    tables = {}
    for name, query in QUERIES.items():
        rows = [tuple(row) for row in await connection.fetch(query, tenant_id)]
        tables[name] = [(*row[:-1], _timeless(row[-1])) for row in rows] if name == "events" else rows
    return tables


def in_order(tables: dict[str, Rows]) -> dict[str, Rows]:
    """The same, comparable."""
    return {name: sorted(rows, key=repr) for name, rows in tables.items()}


def said(result: state_pb2.AppendResult, reason: str) -> Said:
    """What the real process answered."""
    if reason:
        return Said(reason, result.run_id, 0, 0, 0, repeated_key=False)
    return Said("", result.run_id, result.state, result.ordinal, result.last_seq, repeated_key=result.repeated_key)


def _timeless(event: bytes) -> bytes:
    """The event without the time of its commit."""
    parsed = events_pb2.RunEvent.FromString(event)
    parsed.ClearField("event_time")
    return parsed.SerializeToString(deterministic=True)


def _said(entry: Entry, outcome: Outcome) -> Said:
    if not outcome.is_ok:
        return _refused(entry.append, refusal(entry, outcome.reason, run_id=outcome.run_id, state=outcome.state))
    ordinal = outcome.ordinal if entry.is_create else 0
    is_repeated_key = outcome.reason == "key_repeated"
    return Said("", outcome.run_id, outcome.state, ordinal, outcome.last_seq, repeated_key=is_repeated_key)


def _refused(append: state_pb2.Append, error: MainspringError) -> Said:
    return Said(error.reason_name, append.run_id, 0, 0, 0, repeated_key=False)
