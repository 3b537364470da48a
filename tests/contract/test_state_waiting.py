"""Runs that wait, are paused or are handed back: nobody holds them, and what they wait for wakes them, once."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest
from mainspring.v1 import events_pb2, state_pb2, types_pb2
from mainspring_kit.identity import UserExecutionContext

from test_framework.identities import Identities
from tests.contract.state_calls import (
    Executor,
    cancelled,
    claiming,
    completed,
    executing,
    log_of,
    person,
    reason_of,
    started,
    thinking,
)
from tests.contract.state_inputs import (
    PAUSED,
    RELEASE,
    RUNNING,
    WAITING,
    Asker,
    due_in,
    moment,
    park,
    paused,
    resumed,
    signalled,
    waiting,
)

pytestmark = pytest.mark.contract
grpc_service = "State"

# Any in this module: generated stubs have no common base.

RACES = 20


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


async def due_time(environment: dict[str, Any], run_id: str) -> float | None:
    """From when on a run is claimable, in seconds since 1970; None: it is not."""
    owner = await asyncpg.connect(environment["owner_database_url"])
    try:
        found: float | None = await owner.fetchval(
            "SELECT extract(epoch FROM due_time)::float8 FROM state.ready WHERE run_id = $1", run_id
        )
        return found
    finally:
        await owner.close()


async def leases(environment: dict[str, Any], run_id: str) -> int:
    """How many hold a run."""
    owner = await asyncpg.connect(environment["owner_database_url"])
    try:
        count: int = await owner.fetchval("SELECT count(*) FROM state.leases WHERE run_id = $1", run_id)
        return count
    finally:
        await owner.close()


async def test_a_parked_run_holds_nothing_until_its_time(
    aio_stub: Any,
    identities: Identities,
    executor: Executor,
    user: UserExecutionContext,
    ann: Asker,
    contract_environment: dict[str, Any],
) -> None:
    async with claiming(aio_stub, identities) as other, claiming(aio_stub, identities, executor.executor_id, credit=0):
        run_id = await park(executor, user, release=due_in(1.0))
        assert await leases(contract_environment, run_id) == 0
        assert (await ann.run(run_id)).run.state == WAITING
        claimed = await other.next_claim()
        assert (claimed.run.run_id, claimed.run.state, claimed.run.epoch) == (run_id, WAITING, 2)
        assert (claimed.takeovers, claimed.handed_back, list(claimed.inputs)) == (0, False, [])
        stale = await executor.send_one(executor.append(user, run_id, thinking(), after=2))
        assert reason_of(stale.status) == "APPEND_STALE"
        await executor.go_on(user, run_id, thinking(), after=2, epoch=2)
        assert (await ann.run(run_id)).run.state == RUNNING
        await executor.go_on(user, run_id, completed(), after=3, epoch=2)


async def test_a_release_is_due_at_its_time_or_the_runs_deadline_or_never(
    executor: Executor, user: UserExecutionContext, contract_environment: dict[str, Any]
) -> None:
    never = await park(executor, user)
    assert await due_time(contract_environment, never) is None
    soon, late = moment(1_000), moment(2_000)
    for due, deadline, expected in ((soon, late, soon), (late, soon, soon), (None, late, late), (late, None, late)):
        other = person()
        run_id = await executor.start(other, **({"deadline": deadline} if deadline else {}))
        await executor.go_on(other, run_id, waiting(), after=1, release=state_pb2.Release(due_time=due))
        found = await due_time(contract_environment, run_id)
        assert found == pytest.approx(expected.ToNanoseconds() / 1e9, abs=1e-5)


async def test_a_run_that_is_handed_back_is_claimed_at_once_and_nobody_died(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    async with claiming(aio_stub, identities) as other, claiming(aio_stub, identities, executor.executor_id, credit=0):
        run_id = await executor.start(user)
        await executor.go_on(user, run_id, thinking(), after=1, release=due_in(-1))
        for epoch in range(2, 8):
            claimed = await other.next_claim()
            assert (claimed.run.run_id, claimed.run.state, claimed.run.epoch) == (run_id, RUNNING, epoch)
            assert (claimed.takeovers, claimed.handed_back) == (0, True)
            # An append that only lets go; handed back ever so often, a run is not poisoned.
            await executor.go_on(user, run_id, after=2, epoch=epoch, release=due_in(-1))
        claimed = await other.next_claim()
        await executor.go_on(user, run_id, completed(), after=2, epoch=claimed.run.epoch)
    events = await log_of(aio_stub, identities, user, run_id)
    assert [event.seq for event in events] == [1, 2, 3]


async def test_a_handed_back_run_whose_next_holder_dies_was_not_handed_back_but_taken_over(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    async with claiming(aio_stub, identities) as doomed:
        async with executing(aio_stub, identities) as first:
            run_id = await first.start(user)
            await first.go_on(user, run_id, thinking(), after=1, release=due_in(-1))
        assert (await doomed.next_claim()).handed_back
        async with claiming(aio_stub, identities) as successor:
            await doomed.leave()
            claimed = await successor.next_claim()
            assert (claimed.run.run_id, claimed.handed_back, claimed.takeovers) == (run_id, False, 1)
            await executor.go_on(user, run_id, completed(), after=2, epoch=claimed.run.epoch)


async def test_a_repeated_release_is_ok_until_somebody_claimed_the_run(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    empty = executor.append(user, run_id, after=1, release=RELEASE)
    for _ in range(3):
        result = await executor.send_one(empty)
        assert (reason_of(result.status), result.state, result.last_seq) == ("", RUNNING, 1)
    parked = executor.append(user, run_id, waiting(), after=1, release=RELEASE)
    for _ in range(3):
        result = await executor.send_one(parked)
        assert (reason_of(result.status), result.state, result.last_seq) == ("", WAITING, 2)
    stale = await executor.send_one(empty)
    assert reason_of(stale.status) == "APPEND_STALE"


async def test_appends_that_let_go_of_nothing_are_refused(executor: Executor, user: UserExecutionContext) -> None:
    run_id = await executor.start(user)
    nothing = executor.append(user, run_id, after=1)
    at_end = executor.append(user, run_id, completed(), after=1, release=RELEASE)
    create = executor.create(person())
    create.release.CopyFrom(RELEASE)
    no_moment = executor.append(user, run_id, after=1, release=state_pb2.Release())
    no_moment.release.due_time.seconds = 1 << 60
    for append in (nothing, at_end, create, no_moment):
        assert reason_of((await executor.send_one(append)).status) == "REQUEST_INVALID"
    unknown = executor.append(user, run_id, after=1, release=RELEASE)
    unknown.run_id = person().run_id
    assert reason_of((await executor.send_one(unknown)).status) == "RUN_NOT_FOUND"
    await executor.go_on(user, run_id, completed(), after=1)
    ended = executor.append(user, run_id, after=2, release=RELEASE)
    assert reason_of((await executor.send_one(ended)).status) == "RUN_ENDED"


async def test_a_signal_wakes_a_waiting_run_and_comes_with_the_claim(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext, ann: Asker
) -> None:
    async with claiming(aio_stub, identities, executor.executor_id) as claimer:
        run_id = await park(executor, user)
        for name in ("one", "two", "three"):
            assert await ann.signal(run_id, name, request_id=name) == ""
        claimed = await claimer.next_claim()
        assert (claimed.run.run_id, claimed.run.state) == (run_id, WAITING)
        names = [run_input.signal.name for run_input in claimed.inputs]
        # Those that came since are told, maybe one again that came with the claim.
        while len(set(names)) < 3:
            names.append((await claimer.next_input()).signal.name)
        assert list(dict.fromkeys(names)) == ["one", "two", "three"]
        # The signals are none that it waits for: taken, it waits on, and is not woken by them again.
        took = [signalled(name) for name in ("one", "two", "three")]
        consumed = ["one", "two", "three"]
        parked = executor.append(user, run_id, *took, after=2, epoch=2, consumed_request_ids=consumed, release=RELEASE)
        result = await executor.send_one(parked)
        assert (reason_of(result.status), result.state) == ("", WAITING)
        assert await ann.cancel(run_id) == ""
        assert (await claimer.next_claim()).inputs[0].HasField("cancel")
        await executor.go_on(user, run_id, cancelled(), after=5, epoch=3)


async def test_an_input_that_the_sender_of_a_release_did_not_know_wakes_the_run_at_once(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext, ann: Asker
) -> None:
    async with claiming(aio_stub, identities) as other, claiming(aio_stub, identities, executor.executor_id, credit=0):
        run_id = await executor.start(user)
        assert await ann.signal(run_id) == ""
        await executor.go_on(user, run_id, waiting(), after=1, release=RELEASE)
        claimed = await other.next_claim()
        assert (claimed.run.state, [run_input.signal.name for run_input in claimed.inputs]) == (WAITING, ["go"])
        await executor.go_on(user, run_id, cancelled(), after=2, epoch=2)


async def test_a_paused_run_is_woken_by_cancel_and_resume_alone(
    aio_stub: Any,
    identities: Identities,
    executor: Executor,
    user: UserExecutionContext,
    ann: Asker,
    contract_environment: dict[str, Any],
) -> None:
    async with claiming(aio_stub, identities) as other, claiming(aio_stub, identities, executor.executor_id, credit=0):
        run_id = await executor.start(user)
        assert await ann.signal(run_id, "early", request_id="early") == ""
        await executor.go_on(user, run_id, paused(), after=1, release=RELEASE)
        assert await ann.signal(run_id, "late", request_id="late") == ""
        assert await due_time(contract_environment, run_id) is None
        assert await ann.resume(run_id) == ""
        claimed = await other.next_claim()
        assert claimed.run.state == PAUSED
        kinds = [run_input.WhichOneof("input") for run_input in claimed.inputs]
        assert kinds == ["signal", "signal", "resume"]
        going_on = [signalled("early"), signalled("late"), resumed()]
        consumed = [run_input.request_id for run_input in claimed.inputs]
        await executor.go_on(user, run_id, *going_on, after=2, epoch=2, consumed_request_ids=consumed)
        assert (await ann.run(run_id)).run.state == RUNNING
        await executor.go_on(user, run_id, paused(), after=5, epoch=2, release=RELEASE)
        assert await ann.cancel(run_id) == ""
        claimed = await other.next_claim()
        assert (claimed.run.state, claimed.inputs[0].WhichOneof("input")) == (PAUSED, "cancel")
        await executor.go_on(user, run_id, cancelled(), after=6, epoch=3)


async def test_a_paused_run_out_of_time_is_claimable(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    async with claiming(aio_stub, identities, executor.executor_id) as claimer:
        run_id = await executor.start(user, deadline=moment(0.5))
        await executor.go_on(user, run_id, paused(), after=1, release=RELEASE)
        claimed = await claimer.next_claim()
        assert (claimed.run.run_id, claimed.run.state) == (run_id, PAUSED)
        timed_out = events_pb2.RunEvent(agent_timed_out=events_pb2.AgentTimedOut())
        await executor.go_on(user, run_id, timed_out, after=2, epoch=2)


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([waiting(), thinking()], RUNNING),
        ([waiting(), signalled()], WAITING),
        ([waiting(), waiting()], WAITING),
        ([waiting(), paused(), signalled()], PAUSED),
        ([paused(), resumed()], RUNNING),
        ([paused(), resumed(), waiting()], WAITING),
    ],
)
async def test_what_may_come_leads_where_it_should(
    executor: Executor,
    user: UserExecutionContext,
    events: list[events_pb2.RunEvent],
    state: types_pb2.RunState.ValueType,
) -> None:
    run_id = await executor.start(user)
    result = await executor.send_one(executor.append(user, run_id, *events, after=1))
    assert (reason_of(result.status), result.state) == ("", state)
    # And one by one.
    other = person()
    run_id = await executor.start(other)
    for seq, event in enumerate(events, 1):
        result = await executor.send_one(executor.append(other, run_id, event, after=seq))
        assert reason_of(result.status) == ""
    assert result.state == state


@pytest.mark.parametrize(
    ("before", "event"),
    [
        ([], resumed()),
        ([waiting()], resumed()),
        ([waiting()], completed()),
        ([paused()], paused()),
        ([paused()], waiting()),
        ([paused()], thinking()),
        ([paused()], completed()),
        ([waiting()], events_pb2.RunEvent(run_recovered=events_pb2.RunRecovered(attempt=1))),
        ([], started()),
    ],
)
async def test_what_cannot_come_is_refused(
    executor: Executor, user: UserExecutionContext, before: list[events_pb2.RunEvent], event: events_pb2.RunEvent
) -> None:
    run_id = await executor.start(user)
    if before:
        await executor.go_on(user, run_id, *before, after=1)
        together = executor.append(user, run_id, *before, event, after=1)
        assert reason_of((await executor.send_one(together)).status) in ("TRANSITION_ILLEGAL", "APPEND_STALE")
    refused = await executor.send_one(executor.append(user, run_id, event, after=1 + len(before)))
    assert reason_of(refused.status) == "TRANSITION_ILLEGAL"


async def test_a_release_and_an_input_at_once_never_lose_the_input(
    aio_stub: Any, identities: Identities, executor: Executor, ann: Asker, user: UserExecutionContext
) -> None:
    async with claiming(aio_stub, identities) as other, claiming(aio_stub, identities, executor.executor_id, credit=0):
        owners = [person(user.tenant_id) for _ in range(RACES)]
        runs = [await executor.start(owner) for owner in owners]

        async def race(owner: UserExecutionContext, run_id: str) -> None:
            asker = Asker(aio_stub, identities, owner)
            parked = executor.append(owner, run_id, waiting(), after=1, release=RELEASE)
            result, refusal = await asyncio.gather(executor.send_one(parked), asker.signal(run_id))
            assert (reason_of(result.status), refusal) == ("", "")

        await asyncio.gather(*map(race, owners, runs))
        claimed: dict[str, int] = {}
        while len(claimed) < RACES:
            claim = await other.next_claim()
            claimed[claim.run.run_id] = len(claim.inputs)
        assert claimed == dict.fromkeys(runs, 1)
