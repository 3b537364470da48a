"""The release before beside this one: what its processes call in the database does what they expect of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, Final

import asyncpg
import pytest
from mainspring.v1 import state_pb2
from mainspring_kit.identity import UserExecutionContext
from mainspring_state.core.append import check, stamp
from mainspring_state.store.log import Batch

from test_framework.identities import Identities, unique
from tests.contract.state_calls import Executor, claiming, completed, person, thinking
from tests.contract.state_inputs import RELEASE, WAITING, Asker, fork_sub_run, park, waiting

pytestmark = pytest.mark.contract
grpc_service = "State"

# Any in this module: what a statement takes and gives.

# How many arguments `state.append` has had since 0001, all of which are the first ones of its successor.
APPEND_ARGUMENTS: Final = 33
COLUMNS: Final = (
    "made", "made_running", "made_ordinals", "hit", "hit_users", "hit_ordinals", "missed", "missed_reasons",
    "missed_runs", "missed_states", "missed_seqs", "missed_ordinals", "became_ready",
)  # fmt: skip


class Former:
    """A state process of the release before, as far as the database knows it."""

    def __init__(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        self.connection = connection

    async def append(self, *appends: state_pb2.Append) -> asyncpg.Record:
        """Commits appends."""
        entries = [check(append) for append in appends]
        for entry in entries:
            stamp(entry, seconds=1_800_000_000, nanos=0)
        places = ", ".join(f"${number}" for number in range(1, APPEND_ARGUMENTS + 1))
        arguments = Batch(entries).arguments[:APPEND_ARGUMENTS]
        row = await self.connection.fetchrow(f"SELECT * FROM state.append({places})", *arguments)
        assert row is not None and tuple(row.keys()) == COLUMNS
        return row

    async def claim(self, executor_id: str) -> list[str]:
        """Claims for an executor that beats."""
        await self.connection.execute("SELECT state.beat($1, 's', 600)", executor_id)
        rows = await self.connection.fetch(
            "SELECT * FROM state.claim($1, 10, $2, 'former', 600, 3, 64)", executor_id, datetime.now(UTC)
        )
        return [str(row["run_id"]) for row in rows]

    async def cancel(self, user: UserExecutionContext, run_id: str) -> asyncpg.Record | None:
        """Asks for a run's end."""
        return await self.connection.fetchrow(
            "SELECT state, holder, (input).* FROM state.put_input($1, $2, $3, 'r', $2, '')",
            user.tenant_id, user.user_id, run_id,
        )  # fmt: skip


@pytest.fixture
async def former(contract_environment: dict[str, Any]) -> AsyncIterator[Former]:
    """Nobody drives anything yet."""
    owner = await asyncpg.connect(contract_environment["owner_database_url"])
    await owner.execute("TRUNCATE state.leases, state.ready, state.queued, state.executors")
    await owner.close()
    connection = await asyncpg.connect(contract_environment["database_url"])
    yield Former(connection)
    await connection.close()


async def test_a_former_process_creates_continues_and_ends_runs(
    aio_stub: Any, identities: Identities, executor: Executor, former: Former, user: UserExecutionContext
) -> None:
    create = executor.create(user)
    row = await former.append(create, executor.create(person()))
    assert (row["made"], row["made_running"], row["missed"]) == ([1, 2], [True, True], [])
    assert (await former.append(create))["missed_reasons"] == ["repeated"]
    row = await former.append(executor.append(user, create.run_id, thinking(), after=1))
    assert (row["hit"], row["hit_users"]) == ([1], [user.user_id])
    await former.append(executor.append(user, create.run_id, completed(), after=2))
    run = (await Asker(aio_stub, identities, user).run(create.run_id)).run
    assert (run.last_seq, run.attempt, run.root_run_id) == (3, 1, create.run_id)
    assert run.HasField("end_time")


async def test_a_former_process_moves_a_sessions_line(
    executor: Executor, former: Former, user: UserExecutionContext
) -> None:
    head, second = executor.create(user), executor.create(user)
    await former.append(head)
    assert (await former.append(second))["made_running"] == [False]
    assert (await former.append(executor.append(user, head.run_id, completed(), after=1)))["became_ready"]
    assert await former.claim(unique("executor")) == [second.run_id]


async def test_the_end_of_a_sub_run_reaches_its_parent_through_a_former_process(
    aio_stub: Any, identities: Identities, executor: Executor, former: Former, user: UserExecutionContext
) -> None:
    async with claiming(aio_stub, identities) as other, claiming(aio_stub, identities, executor.executor_id, credit=0):
        parent = await executor.start(user)
        child = await fork_sub_run(executor, user, parent)
        await executor.go_on(user, parent, waiting(), after=1, release=RELEASE)
        await former.append(executor.append(user, child, completed(), after=1))
        claimed = await other.next_claim()
        assert [run_input.request_id for run_input in claimed.inputs] == [child]
        await executor.go_on(user, parent, thinking(), after=2, epoch=2)


async def test_a_former_process_cancels_and_claims_a_run_that_waits(
    aio_stub: Any, identities: Identities, executor: Executor, former: Former, user: UserExecutionContext
) -> None:
    run_id = await park(executor, user)
    stored = await former.cancel(user, run_id)
    assert stored is not None and (stored["state"], stored["holder"]) == (WAITING, None)
    assert await former.cancel(person(user.tenant_id), run_id) is None
    assert await former.claim(unique("executor")) == [run_id]
    assert (await Asker(aio_stub, identities, user).run(run_id)).run.state == WAITING
