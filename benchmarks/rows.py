"""Tables of a given size in the real schema, written straight into the database: what an old installation holds."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

import asyncpg
from mainspring.v1 import events_pb2, types_pb2

TENANT: Final = "dev"
RUNS_PER_USER: Final = 1_000
EVENTS_PER_LOG: Final = 10
_RUN_ID_BYTES: Final = 36

# Every tenth run has a log, of ten events: so many rows in each of the three tables. Run ids are UUIDv7 of the last
# minutes, in order; who is user n has the runs and sessions n * 1,000 to n * 1,000 + 999.
_MAKE_IDS: Final = """
    CREATE TEMP TABLE loaded AS
    SELECT i, 'member-' || i / 1000 AS user_id, 'session-' || i AS session_id,
      (lpad(to_hex((extract(epoch FROM clock_timestamp()) * 1000)::bigint - $1 + i), 12, '0') || '7'
        || substr(md5(i::text), 1, 3) || 'a' || substr(md5(i::text), 4, 15))::uuid AS run_id
    FROM generate_series(0::bigint, $1 - 1) AS i
"""
_INSERT_SESSIONS: Final = """
    INSERT INTO state.sessions (last_run_id, run_count, policy, tenant_id, user_id, session_id)
    SELECT run_id, 1, 4, $1, user_id, session_id FROM loaded
"""
_INSERT_RUNS: Final = """
    INSERT INTO state.runs (run_id, append_id, ordinal, last_seq, start_time, end_time, released_time, state, tenant_id,
      user_id, session_id, agent, agent_version, trace_id, input, result, stages, usage)
    SELECT run_id, run_id, 1, CASE WHEN i % 10 = 0 THEN 10 ELSE 0 END, now(), now(), now(), 5, $1, user_id, session_id,
      'lookup', '1', md5(i::text), '{"value":"forty-two"}', '{"answer":"forty-two"}',
      '[{"name":"core_execution","duration_ms":5.0}]', '{"input_tokens":12,"output_tokens":9}'
    FROM loaded
"""
_INSERT_EVENTS: Final = """
    INSERT INTO state.events (run_id, seq, event_time, append_id, tenant_id, user_id, type, event)
    SELECT run_id, seq, now(), run_id, $1, user_id, 'agent_thinking',
      '\\x0a24'::bytea || convert_to(run_id::text, 'UTF8') || rest
    FROM loaded CROSS JOIN unnest($2::bytea[]) WITH ORDINALITY AS event (rest, seq) WHERE i % 10 = 0
"""
_EMPTY: Final = (
    "TRUNCATE state.sessions, state.runs, state.events, state.leases, state.ready, state.queued, state.inputs"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One loaded run, with the user and the session it belongs to."""

    user_id: str
    session_id: str
    run_id: str


@dataclass(frozen=True, slots=True)
class Rows:
    """What was loaded: a sample of all runs, and of those that have a log."""

    sessions: list[Row]
    logs: list[Row]


async def load(database: asyncpg.Connection, count: int, *, seed: int, sample: int) -> Rows:
    """Empties the tables, writes so many rows into each, and has them vacuumed and analysed."""
    async with database.transaction():
        await database.execute(_EMPTY)
        await database.execute("DROP TABLE IF EXISTS loaded")
        await database.execute(_MAKE_IDS.replace("$1", str(count)))
        await database.execute(_INSERT_SESSIONS.replace("$1", f"'{TENANT}'"))
        await database.execute(_INSERT_RUNS.replace("$1", f"'{TENANT}'"))
        rests = [_event(seq).SerializeToString()[2 + _RUN_ID_BYTES :] for seq in range(1, EVENTS_PER_LOG + 1)]
        await database.execute(_INSERT_EVENTS, TENANT, rests)
    await database.execute("VACUUM ANALYZE state.sessions, state.runs, state.events")
    await database.execute("CHECKPOINT")
    draw = random.Random(seed)
    numbers = draw.sample(range(count), min(sample, count))
    logs = [10 * number for number in draw.sample(range(count // 10), min(sample, count // 10))]
    return Rows(await _read(database, numbers), await _read(database, logs))


async def _read(database: asyncpg.Connection, numbers: list[int]) -> list[Row]:
    rows = await database.fetch(
        "SELECT user_id, session_id, run_id::text FROM unnest($1::bigint[]) WITH ORDINALITY AS wanted (i, place)"
        " JOIN loaded USING (i) ORDER BY place",
        numbers,
    )
    return [Row(*row) for row in rows]


def _event(seq: int) -> events_pb2.RunEvent:
    """A model step as such runs have it; its run id, the first field, is put in by the database."""
    event = events_pb2.RunEvent(
        run_id="0" * _RUN_ID_BYTES,
        seq=seq,
        append_id="0" * _RUN_ID_BYTES,
        session_id="session-0",
        agent="lookup",
        trace_id="0" * 32,
        agent_thinking=events_pb2.AgentThinking(
            step=seq,
            text="I will look it up.",
            model="scripted/script",
            usage=types_pb2.Usage(input_tokens=6, output_tokens=5),
        ),
    )
    event.event_time.GetCurrentTime()
    return event
