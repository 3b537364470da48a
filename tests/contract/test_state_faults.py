"""The state service while the database's connections break under it: nothing is lost, nothing stored twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import grpc
import pytest
from mainspring.v1 import events_pb2, state_pb2, types_pb2
from mainspring_kit.identity import UserExecutionContext
from mainspring_kit.tasks import background

from test_framework.grpc_testing import error_of
from test_framework.identities import Identities
from test_framework.waiting import wait_until
from tests.contract.state_calls import (
    TIMEOUT,
    Executor,
    Watcher,
    claiming,
    completed,
    person,
    reason_of,
    thinking,
)

pytestmark = pytest.mark.contract
grpc_service = "State"

# Any in this module: generated stubs have no common base, asyncpg's connections are generic for checkers only.

RUNS = 40
STEPS = 12


@pytest.fixture
async def owner(contract_environment: dict[str, Any]) -> AsyncIterator[Any]:
    """A connection as the owner of the tables."""
    connection = await asyncpg.connect(contract_environment["owner_database_url"])
    yield connection
    await connection.close()


async def break_connections(owner: Any) -> int:
    """Ends every connection of the service; how many there were."""
    ended: int = await owner.fetchval(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
        "WHERE usename = 'mainspring_state' AND datname = current_database()"
    )
    return ended


async def drive(executor: Executor, user: UserExecutionContext) -> str:
    run_id = await executor.start(user)
    for seq in range(1, STEPS):
        await executor.go_on(user, run_id, thinking(), after=seq)
    await executor.go_on(user, run_id, completed(), after=STEPS)
    return run_id


async def test_appends_survive_broken_connections(
    aio_stub: Any, identities: Identities, executor: Executor, owner: Any
) -> None:
    users = [person() for _ in range(RUNS)]
    async with asyncio.TaskGroup() as tasks:
        driven = [tasks.create_task(drive(executor, user)) for user in users]
        broken = 0
        while not all(task.done() for task in driven):
            broken += await break_connections(owner)
            await asyncio.wait(driven, timeout=0.15)
    assert broken > 0
    run_ids = [task.result() for task in driven]
    logs = await owner.fetch(
        "SELECT run_id::text, array_agg(seq ORDER BY seq) AS seqs FROM state.events "
        "WHERE run_id = ANY ($1::text[]::uuid[]) GROUP BY run_id",
        run_ids,
    )
    assert {row["run_id"]: row["seqs"] for row in logs} == {run_id: list(range(1, STEPS + 2)) for run_id in run_ids}
    assert await owner.fetchval("SELECT count(*) FROM state.leases") == 0


async def test_watchers_see_every_event_once_while_connections_break(
    aio_stub: Any, identities: Identities, executor: Executor, owner: Any
) -> None:
    user = person()
    run_id = await executor.start(user)
    watcher = Watcher(aio_stub, identities.metadata(user.tenant_id, user.user_id))
    await watcher.subscribe(run_id)
    await watcher.until_caught_up()
    for seq in range(1, STEPS):
        await break_connections(owner)
        await executor.go_on(user, run_id, thinking(), after=seq)
    await executor.go_on(user, run_id, completed(), after=STEPS)
    await watcher.until_seq(STEPS + 1)
    assert watcher.seqs() == list(range(1, STEPS + 2))
    watcher.close()


async def test_reads_answer_or_say_that_the_database_is_away(
    aio_stub: Any, identities: Identities, executor: Executor, owner: Any
) -> None:
    user = person()
    run_id = await executor.start(user)
    metadata = identities.metadata(user.tenant_id, user.user_id)

    async def read() -> bool:
        try:
            request = state_pb2.GetRunRequest(run_id=run_id)
            run = (await aio_stub.GetRun(request, metadata=metadata, timeout=TIMEOUT)).run
        except grpc.RpcError as error:
            assert error_of(error).reason == "PEER_UNAVAILABLE"
            return False
        assert run.state == types_pb2.RUN_STATE_RUNNING
        return True

    for _ in range(20):
        await break_connections(owner)
        await read()
    await wait_until(read, what="a read after the connections broke")


async def test_two_writers_that_deadlock_both_go_on(
    executor: Executor, owner: Any, contract_environment: dict[str, Any]
) -> None:
    first, second = person(), person()
    # The service locks in the order of runs; this one the other way round.
    runs = sorted([(await executor.start(first), first), (await executor.start(second), second)])
    rival = await asyncpg.connect(contract_environment["owner_database_url"])
    try:
        transaction = rival.transaction()
        await transaction.start()
        await rival.execute("UPDATE state.runs SET stalled = 0 WHERE run_id = $1", runs[1][0])
        appends = [executor.append(user, run_id, thinking(), after=1) for run_id, user in runs]
        async with asyncio.TaskGroup() as tasks:
            sent = tasks.create_task(executor.send(*appends))
            await wait_until(lambda: _waits_for_a_lock(owner), what="the service waits for the rival's row")
            rivals = tasks.create_task(rival.execute("UPDATE state.runs SET stalled = 0 WHERE run_id = $1", runs[0][0]))
            await asyncio.wait([rivals])
            try:
                rivals.result()
                await transaction.commit()
            except asyncpg.DeadlockDetectedError:
                await transaction.rollback()
    except* asyncpg.DeadlockDetectedError:
        # The rival was the victim; its transaction is rolled back.
        pass
    finally:
        await rival.close()
    assert [reason_of(result.status) for result in sent.result()] == ["", ""]


async def _waits_for_a_lock(owner: Any) -> bool:
    return bool(
        await owner.fetchval(
            "SELECT EXISTS (SELECT FROM pg_stat_activity "
            "WHERE usename = 'mainspring_state' AND wait_event_type = 'Lock')"
        )
    )


async def test_a_claim_that_the_database_made_before_its_connection_broke_is_not_lost(
    aio_stub: Any, identities: Identities, executor: Executor, owner: Any
) -> None:
    user = person()
    await owner.execute("TRUNCATE state.leases, state.ready")  # what other tests left undriven
    async with claiming(aio_stub, identities) as claimer:
        async with owner.transaction():
            # The claim is made; what goes with it cannot be read before the connection breaks.
            await owner.execute("LOCK TABLE state.inputs IN ACCESS EXCLUSIVE MODE")
            run_id = await executor.start(user)
            claimed = "SELECT count(*) FROM state.leases WHERE run_id = $1 AND claim_seq IS NOT NULL"
            async with asyncio.timeout(TIMEOUT):
                while not await owner.fetchval(claimed, run_id):
                    await owner.execute("SELECT pg_sleep(0.05)")
            await break_connections(owner)
        assert (await claimer.next_claim()).run.run_id == run_id


@asynccontextmanager
async def troubled(owner: Any, run_id: str, statement: str) -> AsyncIterator[None]:
    """While the block runs the database carries out a statement before each insert into one run's log."""
    await owner.execute(
        "CREATE FUNCTION public.trouble() RETURNS trigger LANGUAGE plpgsql AS $body$ "
        f"BEGIN IF NEW.run_id = '{run_id}' THEN {statement} END IF; RETURN NEW; END $body$; "
        "CREATE TRIGGER trouble BEFORE INSERT ON state.events FOR EACH ROW EXECUTE FUNCTION public.trouble()"
    )
    try:
        yield
    finally:
        await owner.execute("DROP TRIGGER trouble ON state.events; DROP FUNCTION public.trouble()")


async def go_on_all(executor: Executor, users: list[UserExecutionContext], run_ids: list[str]) -> list[str]:
    """Appends one event to each run; the reasons of those that were refused, in order."""
    appends = [executor.append(user, run_id, thinking(), after=1) for user, run_id in zip(users, run_ids, strict=True)]
    return [reason_of(result.status) for result in await executor.send(*appends)]


async def test_an_append_that_meets_conflict_after_conflict_may_come_again(executor: Executor, owner: Any) -> None:
    users = [person() for _ in range(9)]
    run_ids = [await executor.start(user) for user in users]
    async with troubled(owner, run_ids[4], "RAISE EXCEPTION 'again' USING ERRCODE = '40001';"):
        reasons = await go_on_all(executor, users, run_ids)
    assert reasons == ["PEER_UNAVAILABLE" if index == 4 else "" for index in range(9)]
    await executor.go_on(users[4], run_ids[4], thinking(), after=1)


async def end_slow_statements(owner: Any) -> None:
    """Does what PostgreSQL does by itself when a statement takes 30 s, after one: again and again, until cancelled."""
    while True:
        await owner.execute(
            "SELECT pg_sleep(0.1), pg_cancel_backend(pid) FROM pg_stat_activity WHERE usename = 'mainspring_state' "
            "AND datname = current_database() AND state = 'active' AND query_start < now() - interval '1 second'"
        )


async def test_an_append_that_always_takes_too_long_holds_up_no_other(executor: Executor, owner: Any) -> None:
    users = [person() for _ in range(9)]
    run_ids = [await executor.start(user) for user in users]
    async with troubled(owner, run_ids[4], "PERFORM pg_sleep(600);"):
        async with background(end_slow_statements(owner)):
            reasons = await go_on_all(executor, users, run_ids)
        assert reasons == ["PEER_UNAVAILABLE" if index == 4 else "" for index in range(9)]
    await executor.go_on(users[4], run_ids[4], thinking(), after=1)


async def test_a_row_that_somebody_keeps_locked_holds_up_its_own_run_only(executor: Executor, owner: Any) -> None:
    users = [person() for _ in range(9)]
    run_ids = [await executor.start(user) for user in users]
    async with owner.transaction():
        await owner.execute("SELECT FROM state.runs WHERE run_id = $1 FOR UPDATE", run_ids[4])
        async with asyncio.timeout(5):
            reasons = await go_on_all(executor, users, run_ids)
            assert reasons == ["PEER_UNAVAILABLE" if index == 4 else "" for index in range(9)]
        async with asyncio.TaskGroup() as tasks:
            locked = tasks.create_task(executor.send_one(executor.append(users[4], run_ids[4], thinking(), after=1)))
            async with asyncio.timeout(3):
                await executor.go_on(users[0], run_ids[0], thinking(), after=2)
        assert reason_of(locked.result().status) == "PEER_UNAVAILABLE"
    await executor.go_on(users[4], run_ids[4], thinking(), after=1)


async def test_runs_are_handed_out_while_a_poisoned_ones_log_is_read(
    aio_stub: Any, identities: Identities, executor: Executor, owner: Any
) -> None:
    user, other = person(), person()
    recovered = events_pb2.RunEvent(run_recovered=events_pb2.RunRecovered(attempt=1))
    await owner.execute("TRUNCATE state.leases, state.ready")  # what other tests left undriven
    run_id = await executor.start(user)
    for last_seq in (1, 2, 3):
        async with claiming(aio_stub, identities) as victim:
            claimed = await victim.next_claim()
            await executor.go_on(user, run_id, recovered, after=last_seq, epoch=claimed.run.epoch)
    abandoned = await executor.start(other)
    async with claiming(aio_stub, identities) as survivor:
        async with owner.transaction():
            await owner.execute("LOCK TABLE state.events IN ACCESS EXCLUSIVE MODE")
            poisoned = "SELECT count(*) FROM state.leases WHERE run_id = $1 AND executor_id = claim_state_id"
            async with asyncio.timeout(TIMEOUT):
                while not await owner.fetchval(poisoned, run_id):
                    await owner.execute("SELECT pg_sleep(0.05)")
                assert (await survivor.next_claim()).run.run_id == abandoned
            # The read fails: the run is claimed to be ended again.
            await break_connections(owner)
        ended = "SELECT coalesce(error ->> 'reason' = 'RUN_POISONED', false) FROM state.runs WHERE run_id = $1"
        await wait_until(lambda: owner.fetchval(ended, run_id), what="the end of the poisoned run")
