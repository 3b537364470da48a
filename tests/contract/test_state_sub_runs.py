"""Sub-runs over the wire: in no line and no list, and their end is an input of their parent."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest
from mainspring.v1 import state_pb2, types_pb2
from mainspring_kit.identity import UserExecutionContext
from mainspring_state.core.append import check
from mainspring_state.store.log import Batch, LogWriter

from test_framework.identities import Identities
from tests.contract.state_calls import Executor, cancelled, claiming, completed, person, reason_of
from tests.contract.state_inputs import RELEASE, WAITING, Asker, fork_sub_run, waiting

pytestmark = pytest.mark.contract
grpc_service = "State"

# Any in this module: generated stubs have no common base.


@pytest.fixture(autouse=True)
async def nothing_to_claim(contract_environment: dict[str, Any]) -> None:
    """What another test left undriven is not there for this one."""
    owner = await asyncpg.connect(contract_environment["owner_database_url"])
    try:
        await owner.execute("TRUNCATE state.leases, state.ready, state.queued, state.executors")
    finally:
        await owner.close()


@pytest.fixture
def ann(aio_stub: Any, identities: Identities, user: UserExecutionContext) -> Asker:
    """The run's user."""
    return Asker(aio_stub, identities, user)


async def test_the_end_of_a_sub_run_is_told_to_the_holder_of_its_parent(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext, ann: Asker
) -> None:
    async with claiming(aio_stub, identities, executor.executor_id) as holder:
        parent = await executor.start(user)
        child = await fork_sub_run(executor, user, parent)
        await executor.go_on(user, child, completed(), after=1)
        told = await holder.next_input()
        ended = told.sub_run_ended
        assert (told.run_id, told.tenant_id, told.request_id) == (parent, user.tenant_id, child)
        assert (ended.sub_run_id, ended.call_id) == (child, f"{parent}.2.0")
        assert ended.state == types_pb2.RUN_STATE_COMPLETED
        run = (await ann.run(child)).run
        assert (run.parent_run_id, run.root_run_id, run.depth, run.ordinal) == (parent, parent, 1, 0)
        await executor.go_on(user, parent, completed(), after=1, consumed_request_ids=[child])


async def test_the_end_of_a_sub_run_wakes_its_parent_wherever_they_are(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    async with claiming(aio_stub, identities) as other, claiming(aio_stub, identities, executor.executor_id, credit=0):
        parent = await executor.start(user)
        child = await fork_sub_run(executor, user, parent)
        await executor.go_on(user, parent, waiting(), after=1, release=RELEASE)
        await executor.go_on(user, child, cancelled(), after=1)
        claimed = await other.next_claim()
        assert (claimed.run.run_id, claimed.run.state) == (parent, WAITING)
        assert claimed.inputs[0].sub_run_ended.state == types_pb2.RUN_STATE_CANCELLED
        await executor.go_on(user, parent, cancelled(), after=2, epoch=2)


async def test_a_frame_with_the_end_of_a_sub_run_and_its_parents_release_loses_nothing(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    async with claiming(aio_stub, identities) as other, claiming(aio_stub, identities, executor.executor_id, credit=0):
        parent = await executor.start(user)
        child = await fork_sub_run(executor, user, parent)
        end = executor.append(user, child, completed(), after=1)
        parked = executor.append(user, parent, waiting(), after=1, release=RELEASE)
        for result in await executor.send(end, parked):
            assert reason_of(result.status) == ""
        claimed = await other.next_claim()
        assert [run_input.request_id for run_input in claimed.inputs] == [child]
        await executor.go_on(user, parent, cancelled(), after=2, epoch=2)


async def test_a_sub_run_stands_in_no_line_and_in_no_list(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext, ann: Asker
) -> None:
    parent = await executor.start(user)
    children = [await fork_sub_run(executor, user, parent) for _ in range(3)]
    second = await executor.send_one(executor.create(user))
    assert (second.state, second.ordinal) == (types_pb2.RUN_STATE_QUEUED, 2)

    async def listed(**fields: Any) -> list[str]:
        response = await aio_stub.ListRuns(state_pb2.ListRunsRequest(**fields), metadata=ann.metadata, timeout=10)
        return [run.run_id for run in response.runs]

    assert await listed() == [second.run_id, parent]
    assert await listed(session_id=user.session_id) == [second.run_id, parent]
    assert await listed(parent_run_id=parent) == children[::-1]
    assert await listed(parent_run_id=children[0]) == await listed(parent_run_id="none") == []
    for child in children:
        await executor.go_on(user, child, completed(), after=1)
    assert await listed(parent_run_id=parent, states=[types_pb2.RUN_STATE_RUNNING]) == []
    await executor.go_on(user, parent, completed(), after=1)


async def test_a_sub_run_needs_a_parent_of_its_user_that_has_not_ended(
    executor: Executor, user: UserExecutionContext
) -> None:
    parent = await executor.start(user)

    def create(owner: UserExecutionContext, **fields: Any) -> state_pb2.Append:
        made = {"parent_run_id": parent, "root_run_id": parent, "parent_call_id": "c", "depth": 1}
        return executor.create(owner, **(made | fields))

    colleague = person(user.tenant_id)
    stranger = person()
    for owner in (colleague, stranger):
        assert reason_of((await executor.send_one(create(owner))).status) == "RUN_NOT_FOUND"
    for wrong in (
        {"depth": 0},
        {"depth": 11},
        {"root_run_id": "x"},
        {"parent_run_id": "x"},
        {"parent_call_id": ""},
        {"parent_call_id": "c" * 200},
        {"idempotency_key": "k"},
    ):
        assert reason_of((await executor.send_one(create(user, **wrong))).status) == "REQUEST_INVALID"
    append = create(user)
    for _ in range(2):
        assert reason_of((await executor.send_one(append)).status) == ""
    again = create(user)
    again.run_id = again.events[0].run_id = append.run_id
    assert reason_of((await executor.send_one(again)).status) == "RUN_EXISTS"
    await executor.go_on(user, parent, completed(), after=1)
    assert reason_of((await executor.send_one(create(user))).status) == "RUN_ENDED"
    # Its parent is gone: its end is nobody's input.
    await executor.go_on(user, append.run_id, completed(), after=1)


async def test_the_commit_of_a_sub_runs_end_names_the_holder_of_its_parent(
    executor: Executor, user: UserExecutionContext, contract_environment: dict[str, Any]
) -> None:
    parent = await executor.start(user)
    child = await fork_sub_run(executor, user, parent)
    writer = await LogWriter.open(contract_environment["database_url"])
    try:
        committed = await writer.commit(Batch([check(executor.append(user, child, completed(), after=1))]))
    finally:
        writer.close()
    ((holder, told),) = committed.told
    assert (holder, told.run_id, told.tenant_id) == (executor.executor_id, parent, user.tenant_id)
    assert (told.request_id, told.requested_by) == (child, user.user_id)
    assert told.sub_run_ended.call_id == f"{parent}.2.0"
