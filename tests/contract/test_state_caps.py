"""Caps, lines, backlogs and delayed starts over the wire, with two state processes over one database."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from mainspring.v1 import state_pb2_grpc, types_pb2
from mainspring_kit.errors import from_status
from mainspring_kit.identity import UserExecutionContext

from test_framework.identities import Identities, make_context, unique
from test_framework.loop_thread import LoopThread
from test_framework.waiting import wait_until
from tests.contract.state_calls import Executor, cancelled, claiming, executing, person, reason_of, started, thinking
from tests.contract.state_inputs import RELEASE, Asker, moment, waiting
from tests.contract.state_lines import (
    COMPLETED,
    QUEUED,
    RUNNING,
    WAITING,
    begin_and_end,
    caps,
    claimed_of,
    connected,
    drive_all,
    end,
    refusal_of,
    start,
    watching,
)
from tests.contract.state_processes import serving

pytestmark = pytest.mark.contract
grpc_service = "State"

# Any in this module: generated stubs have no common base.

STARTS = 200
TENANT_CAP, USER_CAP = 5, 2


@pytest.fixture(scope="module")
def other_address(grpc_loop: LoopThread, contract_environment: dict[str, Any]) -> Iterator[str]:
    """A second state process over the same database."""
    with grpc_loop.opened(lambda: serving(contract_environment)) as address:
        yield address


@pytest.fixture
async def other_stub(other_address: str) -> AsyncIterator[Any]:
    """A stub of the second process."""
    async with grpc.aio.insecure_channel(other_address) as channel:
        yield state_pb2_grpc.StateServiceStub(channel)


@pytest.fixture
def asker(aio_stub: Any, identities: Identities, user: UserExecutionContext) -> Asker:
    """The user, who asks."""
    return Asker(aio_stub, identities, user)


async def test_no_cap_is_ever_passed_by_starts_that_race_on_two_processes(
    aio_stub: Any, other_stub: Any, identities: Identities, contract_environment: dict[str, Any]
) -> None:
    tenant_id, done = unique("tenant"), set[str]()
    people = [make_context(tenant_id) for _ in range(3)]
    users: dict[str, UserExecutionContext] = {}
    begun: Counter[int] = Counter()

    async def begin(executor: Executor, number: int) -> None:
        user = people[number % len(people)]
        create = executor.create(user, session_id=unique("session"), caps=caps(tenant=TENANT_CAP))
        create.create.caps.add(scope=f"user/{user.user_id}", limit=USER_CAP)
        users[create.run_id] = user
        result = await executor.send_one(create)
        assert reason_of(result.status) == "", result.status.message
        begun[result.state] += 1
        if result.state == RUNNING:
            await executor.go_on(user, create.run_id, thinking(), after=1)
            await end(executor, user, create.run_id, seq=2)
            done.add(create.run_id)

    async with (
        watching(contract_environment["owner_database_url"]),
        executing(aio_stub, identities) as first,
        executing(other_stub, identities) as second,
        claiming(aio_stub, identities, first.executor_id) as one,
        claiming(other_stub, identities, second.executor_id) as two,
        asyncio.TaskGroup() as tasks,
    ):
        for executor, claimer in ((first, one), (second, two)):
            tasks.create_task(drive_all(executor, claimer, users, done, STARTS))
        for number in range(STARTS):
            tasks.create_task(begin((first, second)[number % 2], number))
    async with connected(contract_environment["owner_database_url"]) as owner:
        rows = await owner.fetch(
            "SELECT scope, max(most) AS most, sum(wrong) AS wrong FROM public.seen WHERE tenant_id = $1 GROUP BY scope",
            tenant_id,
        )
        seen = {row["scope"]: row for row in rows}
        assert {scope: row["wrong"] for scope, row in seen.items()} == dict.fromkeys(seen, 0)
        most = {scope: row["most"] for scope, row in seen.items()}
        assert most.pop("tenant") == TENANT_CAP
        assert len(most) == len(people)
        assert max(most.values()) == USER_CAP
        for table in ("caps", "slots", "cap_line", "ready"):
            assert not await owner.fetch(f"SELECT FROM state.{table} WHERE tenant_id = $1", tenant_id)
        assert await owner.fetchval("SELECT queued FROM state.shares WHERE tenant_id = $1", tenant_id) == 0
    assert begun[QUEUED] > STARTS / 2


async def test_the_line_moves_by_priority_and_age_when_runs_end(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    first, state = await start(executor, user, caps=caps(tenant=1))
    assert state == RUNNING
    lined = []
    for priority in (0, -5, 7, 0, 7):
        run_id, state = await start(executor, user, caps=caps(tenant=1), priority=priority)
        assert state == QUEUED
        lined.append((-priority, run_id))
    async with claiming(aio_stub, identities, executor.executor_id) as claimer:
        await end(executor, user, first)
        order = []
        for _ in lined:
            (run,) = await claimed_of(claimer, user.tenant_id, 1)
            assert (run.state, run.last_seq, run.epoch) == (RUNNING, 0, 2)
            order.append(run.run_id)
            await begin_and_end(executor, user, run)
    assert order == [run_id for _, run_id in sorted(lined)]


async def test_a_run_whose_executor_died_keeps_its_slot_until_it_ends(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext, asker: Asker
) -> None:
    async with claiming(aio_stub, identities, executor.executor_id, credit=0) as doomed:
        run_id, _ = await start(executor, user, caps=caps(tenant=1))
        doomed.break_off()
        next_id, state = await start(executor, user, caps=caps(tenant=1))
        assert state == QUEUED
    async with claiming(aio_stub, identities) as claimer:
        (run,) = await claimed_of(claimer, user.tenant_id, 1)
        assert (run.run_id, run.state) == (run_id, RUNNING)
        (hold,) = (await asker.run(next_id, explain=True)).holds
        assert (hold.kind, hold.cap, hold.limit, hold.position) == (types_pb2.HOLD_KIND_CAP, "tenant", 1, 0)
        assert list(hold.run_ids) == [run_id]
        await executor.go_on(user, run_id, cancelled(), after=1, epoch=run.epoch)
        (run,) = await claimed_of(claimer, user.tenant_id, 1)
        assert run.run_id == next_id
        await begin_and_end(executor, user, run)


async def test_a_waiting_run_gives_its_slot_back_and_takes_it_again_before_it_goes_on(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext, asker: Asker
) -> None:
    async with claiming(aio_stub, identities, executor.executor_id) as claimer:
        run_id, _ = await start(executor, user, caps=caps(tenant=1))
        await executor.go_on(user, run_id, waiting(), after=1, release=RELEASE)
        other_id, state = await start(executor, user, caps=caps(tenant=1))
        assert state == RUNNING
        assert await asker.signal(run_id) == ""
        later_id, state = await start(executor, user, caps=caps(tenant=1), priority=1)
        assert state == QUEUED

        async def holds_of_cap() -> list[types_pb2.Hold]:
            holds = (await asker.run(run_id, explain=True)).holds
            return [hold for hold in holds if hold.kind == types_pb2.HOLD_KIND_CAP]

        (hold,) = await wait_until(holds_of_cap)
        assert (list(hold.run_ids), hold.position) == ([other_id], 1)
        assert (await asker.run(run_id)).run.state == WAITING
        await end(executor, user, other_id)
        for expected, state in ((later_id, RUNNING), (run_id, WAITING)):
            (run,) = await claimed_of(claimer, user.tenant_id, 1)
            assert (run.run_id, run.state) == (expected, state)
            await executor.go_on(
                user,
                run.run_id,
                *([] if run.last_seq else [started()]),
                cancelled(),
                after=run.last_seq,
                epoch=run.epoch,
            )


async def test_a_run_in_line_for_a_slot_can_be_ended(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext, asker: Asker
) -> None:
    first, _ = await start(executor, user, caps=caps(tenant=1))
    second, _ = await start(executor, user, caps=caps(tenant=1))
    third, _ = await start(executor, user, caps=caps(tenant=1))
    late, _ = await start(executor, user, caps=caps(tenant=1), deadline=moment(0.3))
    async with claiming(aio_stub, identities, executor.executor_id) as claimer:
        assert await asker.cancel(second) == ""
        for run_id in (second, late):
            (run,) = await claimed_of(claimer, user.tenant_id, 1)
            assert (run.run_id, run.state) == (run_id, QUEUED)
            await executor.go_on(user, run_id, cancelled(), epoch=run.epoch)
        await end(executor, user, first)
        (run,) = await claimed_of(claimer, user.tenant_id, 1)
        assert run.run_id == third
        await begin_and_end(executor, user, run)


async def test_a_higher_cap_lets_the_line_move(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    run_ids = [(await start(executor, user, caps=caps(tenant=1)))[0] for _ in range(4)]
    async with claiming(aio_stub, identities, executor.executor_id) as claimer:
        _, state = await start(executor, user, caps=caps(tenant=3))
        assert state == QUEUED
        runs = await claimed_of(claimer, user.tenant_id, 2)
        assert [run.run_id for run in runs] == run_ids[1:3]
        for run in runs:
            await begin_and_end(executor, user, run)


async def test_runs_of_other_scopes_and_tenants_are_not_held_up(executor: Executor, user: UserExecutionContext) -> None:
    limits = {"tenant": 2, "agent/slow": 1}
    assert (await start(executor, user, caps=caps(**limits)))[1] == RUNNING
    for _ in range(3):
        assert (await start(executor, user, caps=caps(**limits)))[1] == QUEUED
    assert (await start(executor, user, caps=caps(tenant=2)))[1] == RUNNING
    assert (await start(executor, user, caps=caps(tenant=2)))[1] == QUEUED
    assert (await start(executor, person(), caps=caps(**limits)))[1] == RUNNING
    assert (await start(executor, user))[1] == RUNNING


async def test_a_session_has_its_line_before_that_for_slots(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext, asker: Asker
) -> None:
    talk = {"session_id": user.session_id, "caps": caps(tenant=1)}
    first, _ = await start(executor, user, **talk)
    second, state = await start(executor, user, **talk)
    other, _ = await start(executor, user, caps=caps(tenant=1))
    assert state == QUEUED
    (hold,) = (await asker.run(second, explain=True)).holds
    assert hold.kind == types_pb2.HOLD_KIND_SESSION_LINE
    async with claiming(aio_stub, identities, executor.executor_id) as claimer:
        await end(executor, user, first)
        # Its turn comes with that very end: it is older than the other.
        for expected in (second, other):
            (run,) = await claimed_of(claimer, user.tenant_id, 1)
            assert run.run_id == expected
            await begin_and_end(executor, user, run)


async def test_above_the_backlogs_bound_starts_are_refused_with_a_time_to_come_back(
    executor: Executor, user: UserExecutionContext
) -> None:
    bounds = {"caps": caps(tenant=2), "backlog_max": 3}
    creates = [executor.create(user, session_id=unique("session"), **bounds) for _ in range(20)]
    results = await executor.send(*creates)
    assert Counter((reason_of(result.status), result.state) for result in results) == {
        ("", RUNNING): 2,
        ("", QUEUED): 3,
        ("BACKLOG_FULL", 0): 15,
    }
    error = from_status(await refusal_of(executor, user, **bounds))
    assert (error.reason_name, error.metadata, error.code) == (
        "BACKLOG_FULL",
        {"limit": "3"},
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    )
    assert error.retry_after_seconds == 5.0
    # What was made before is no new start; what need not wait is not refused; nor is another tenant.
    again = next(create for create, result in zip(creates, results, strict=True) if result.state == QUEUED)
    assert reason_of((await executor.send_one(again)).status) == ""
    assert (await start(executor, user, backlog_max=3))[1] == RUNNING
    assert (await start(executor, person(), **bounds))[1] == RUNNING
    # One that begins makes room for one.
    running = [result.run_id for result in results if result.state == RUNNING]
    await end(executor, user, running[0])
    assert reason_of(await refusal_of(executor, user, **bounds)) == "BACKLOG_FULL"


async def test_a_run_does_not_begin_before_its_time(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext, asker: Asker
) -> None:
    due = moment(1.0)
    run_id, state = await start(executor, user, due_time=due, caps=caps(tenant=1))
    never_id, _ = await start(executor, user, due_time=Timestamp(seconds=4_000_000_000))
    assert state == QUEUED
    (hold,) = (await asker.run(run_id, explain=True)).holds
    assert hold.kind == types_pb2.HOLD_KIND_TIMER
    assert abs(hold.until.ToMicroseconds() - due.ToMicroseconds()) <= 1
    assert (await start(executor, user, due_time=moment(-5)))[1] == RUNNING
    async with claiming(aio_stub, identities, executor.executor_id) as claimer:
        (run,) = await claimed_of(claimer, user.tenant_id, 1)
        assert time.time() >= due.ToMicroseconds() / 1e6
        assert (run.run_id, run.state) == (run_id, RUNNING)
        await begin_and_end(executor, user, run)
        assert await asker.cancel(never_id) == ""
        (run,) = await claimed_of(claimer, user.tenant_id, 1)
        assert (run.run_id, run.state) == (never_id, QUEUED)
        await executor.go_on(user, never_id, cancelled(), epoch=run.epoch)
    assert (await asker.run(run_id)).run.state == COMPLETED


async def test_a_run_without_an_executor_stands_in_its_tenants_line(
    executor: Executor, user: UserExecutionContext, asker: Asker
) -> None:
    run_ids = [(await start(executor, user, queue_only=True))[0] for _ in range(3)]
    holds = {hold.kind: hold for hold in (await asker.run(run_ids[2], explain=True)).holds}
    assert holds[types_pb2.HOLD_KIND_BACKLOG].position == 2


@pytest.mark.parametrize(("weight", "share"), [(1, 10), (3, 15)])
async def test_a_tenant_with_a_thousand_runs_in_line_does_not_hold_up_another(
    aio_stub: Any, identities: Identities, executor: Executor, weight: int, share: int
) -> None:
    noisy, quiet = person(), person()
    crowd = [executor.create(noisy, session_id=unique("session"), queue_only=True, priority=100) for _ in range(1_000)]
    for first in range(0, len(crowd), 250):
        await executor.send(*crowd[first : first + 250])
    own = [executor.create(quiet, session_id=unique("session"), queue_only=True, weight=weight) for _ in range(20)]
    await executor.send(*own)
    async with claiming(aio_stub, identities, executor.executor_id, credit=1_000) as claimer:
        tenants: list[str] = []
        async with asyncio.timeout(20):
            while len(tenants) < 20:
                tenant_id = (await claimer.next_claim()).run.tenant_id
                tenants += [tenant_id] if tenant_id in (noisy.tenant_id, quiet.tenant_id) else []
    assert abs(tenants.count(quiet.tenant_id) - share) <= 1
