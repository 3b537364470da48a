"""Runs that stand in lines, for the contract tests of state: starts with caps, what is claimed, who drives it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from mainspring.v1 import state_pb2, types_pb2
from mainspring_kit.identity import UserExecutionContext

from test_framework.identities import unique
from tests.contract.state_calls import TIMEOUT, Claimer, Executor, completed, reason_of, started

# Any in this module: fields are those of the messages.

QUEUED = types_pb2.RUN_STATE_QUEUED
RUNNING = types_pb2.RUN_STATE_RUNNING
WAITING = types_pb2.RUN_STATE_WAITING
COMPLETED = types_pb2.RUN_STATE_COMPLETED

# Counts, at each commit, how many runs are RUNNING under each cap at most, and how often the slots that are said to be
# used are not those that runs hold, or a run is RUNNING without its own.
_WATCH = """
CREATE TABLE IF NOT EXISTS public.seen (tenant_id text, scope text, most integer, wrong integer);
CREATE OR REPLACE FUNCTION public.look_at(a_tenant_id text, a_scope text) RETURNS void LANGUAGE sql AS $$
  INSERT INTO public.seen SELECT a_tenant_id, a_scope, running.count, (
    SELECT count(*) FROM state.caps c WHERE c.tenant_id = a_tenant_id AND c.scope = a_scope AND c.used <> held.count)
    + running.naked
  FROM (
    SELECT count(*), count(*) FILTER (WHERE h.run_id IS NULL) AS naked FROM state.runs r
    LEFT JOIN state.slots h ON h.tenant_id = r.tenant_id AND h.run_id = r.run_id
    WHERE r.tenant_id = a_tenant_id AND r.caps @> ARRAY[a_scope] AND r.state = 2) AS running, (
    SELECT count(*) FROM state.slots h WHERE h.tenant_id = a_tenant_id AND h.scopes @> ARRAY[a_scope]) AS held
$$;
CREATE OR REPLACE FUNCTION public.look_at_cap() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
  PERFORM public.look_at(NEW.tenant_id, NEW.scope);
  RETURN NULL;
END $$;
CREATE OR REPLACE FUNCTION public.look_at_run() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
  PERFORM public.look_at(NEW.tenant_id, scope) FROM unnest(NEW.caps) AS scope WHERE NEW.state = 2;
  RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER watch AFTER INSERT OR UPDATE ON state.caps DEFERRABLE INITIALLY DEFERRED
  FOR EACH ROW EXECUTE FUNCTION public.look_at_cap();
CREATE CONSTRAINT TRIGGER watch AFTER INSERT OR UPDATE ON state.runs DEFERRABLE INITIALLY DEFERRED
  FOR EACH ROW EXECUTE FUNCTION public.look_at_run();
"""


@asynccontextmanager
async def connected(owner_url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection as the database's owner while the block runs."""
    connection = await asyncpg.connect(owner_url)
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def watching(owner_url: str) -> AsyncIterator[None]:
    """The database counts, at every commit while the block runs, how many runs are RUNNING under each cap."""
    async with connected(owner_url) as connection:
        await connection.execute(_WATCH)
        yield
        await connection.execute("DROP TRIGGER watch ON state.caps; DROP TRIGGER watch ON state.runs")


def caps(**limits: int) -> list[state_pb2.Cap]:
    """Caps by scope."""
    return [state_pb2.Cap(scope=scope, limit=limit) for scope, limit in limits.items()]


async def start(executor: Executor, user: UserExecutionContext, **fields: Any) -> tuple[str, int]:
    """Starts a run in a session of its own; its id and state."""
    fields = {"session_id": unique("session")} | fields
    result = await executor.send_one(executor.create(user, **fields))
    assert reason_of(result.status) == "", result.status.message
    return result.run_id, result.state


async def refusal_of(executor: Executor, user: UserExecutionContext, **fields: Any) -> Any:
    """The status of a start that is refused, or OK."""
    create = executor.create(user, **({"session_id": unique("session")} | fields))
    return (await executor.send_one(create)).status


async def end(executor: Executor, user: UserExecutionContext, run_id: str, *, seq: int = 1, epoch: int = 1) -> None:
    """Ends a run that has begun."""
    await executor.go_on(user, run_id, completed(), after=seq, epoch=epoch)


async def begin_and_end(executor: Executor, user: UserExecutionContext, run: types_pb2.Run) -> None:
    """Drives a run that was claimed from a line."""
    events = [completed()] if run.last_seq else [started(), completed()]
    await executor.go_on(user, run.run_id, *events, after=run.last_seq, epoch=run.epoch)


async def claimed_of(claimer: Claimer, tenant_id: str, count: int) -> list[types_pb2.Run]:
    """The next runs of a tenant that the claimer is given."""
    runs: list[types_pb2.Run] = []
    async with asyncio.timeout(TIMEOUT):
        while len(runs) < count:
            claimed = await claimer.next_claim()
            runs += [claimed.run] if claimed.run.tenant_id == tenant_id else []
    return runs


async def drive_all(
    executor: Executor, claimer: Claimer, users: Mapping[str, UserExecutionContext], done: set[str], count: int
) -> None:
    """Begins and ends whatever is claimed, until so many runs are done."""
    while len(done) < count:
        try:
            run = (await asyncio.wait_for(claimer.claimed.get(), 0.1)).run
        except TimeoutError:
            continue
        if run.run_id in users:
            await begin_and_end(executor, users[run.run_id], run)
            done.add(run.run_id)
