"""Leases over the wire: beats keep them, what nobody drives is claimed, what is asked of a run reaches its holder."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from mainspring.v1 import events_pb2, state_pb2, types_pb2
from mainspring_kit.identity import UserExecutionContext, new_id

from test_framework.grpc_testing import error_of
from test_framework.identities import Identities, unique
from tests.contract.state_calls import (
    TIMEOUT,
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

pytestmark = pytest.mark.contract
grpc_service = "State"

# Any in this module: generated stubs and calls have no common base.

STREAMS = 20
RECOVERED = events_pb2.RunEvent(run_recovered=events_pb2.RunRecovered(attempt=1))


@pytest.fixture(autouse=True)
async def nothing_to_claim(contract_environment: dict[str, Any]) -> None:
    """What another test left undriven is not there for this one."""
    owner = await asyncpg.connect(contract_environment["owner_database_url"])
    try:
        await owner.execute("TRUNCATE state.leases, state.ready, state.queued, state.executors")
    finally:
        await owner.close()


async def cancel(
    stub: Any, identities: Identities, user: UserExecutionContext, run_id: str, *, request_id: str = ""
) -> state_pb2.RunInput:
    request = state_pb2.PutInputRequest(
        run_id=run_id, request_id=request_id, cancel=state_pb2.CancelInput(reason="enough")
    )
    metadata = identities.metadata(user.tenant_id, user.user_id)
    stored: state_pb2.RunInput = (await stub.PutInput(request, metadata=metadata, timeout=TIMEOUT)).input
    return stored


async def refused(stub: Any, identities: Identities, user: UserExecutionContext, run_id: str) -> str:
    with pytest.raises(grpc.RpcError) as raised:
        await cancel(stub, identities, user, run_id)
    return error_of(raised.value).reason


async def end(executor: Executor, user: UserExecutionContext, claimed: state_pb2.ClaimedRun) -> None:
    await executor.go_on(user, claimed.run.run_id, cancelled(), after=claimed.run.last_seq, epoch=claimed.run.epoch)


@pytest.mark.parametrize("how", ["silent", "broken", "leaving"])
async def test_a_dead_executors_run_goes_to_another_under_a_new_epoch(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext, how: str
) -> None:
    async with (
        claiming(aio_stub, identities) as successor,
        claiming(aio_stub, identities, executor.executor_id, credit=0) as holder,
    ):
        run_id = await executor.start(user)
        await executor.go_on(user, run_id, thinking(), after=1)
        if how == "silent":
            holder.fall_silent()
        elif how == "broken":
            holder.break_off()
        else:
            await holder.leave()
        claimed = await successor.next_claim()
        assert (claimed.run.run_id, claimed.run.epoch, claimed.run.last_seq, claimed.takeovers) == (run_id, 2, 2, 1)
        assert (claimed.run.state, list(claimed.inputs)) == (types_pb2.RUN_STATE_RUNNING, [])
        stale = await executor.send_one(executor.append(user, run_id, thinking(), after=2))
        assert reason_of(stale.status) == "APPEND_STALE"
        await executor.go_on(user, run_id, RECOVERED, completed(), after=2, epoch=2)
    assert successor.claimed.empty()


async def test_a_living_executor_keeps_its_runs(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    async with claiming(aio_stub, identities) as other, claiming(aio_stub, identities, executor.executor_id, credit=0):
        run_id = await executor.start(user)
        # The other is given what a dead one leaves; by then the living one's lease would have passed several times.
        orphan = person()
        async with executing(aio_stub, identities) as dead:
            orphaned = await dead.start(orphan)
        claimed = await other.next_claim()
        assert claimed.run.run_id == orphaned
        await executor.go_on(user, run_id, completed(), after=1)
        await end(executor, orphan, claimed)
        assert other.claimed.empty()


async def test_a_queued_run_is_handed_over_when_its_turn_comes(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    async with claiming(aio_stub, identities, executor.executor_id) as claimer:
        head, second, third = await executor.send(*(executor.create(user) for _ in range(3)))
        await executor.go_on(user, head.run_id, completed(), after=1)
        for expected in (second, third):
            claimed = await claimer.next_claim()
            run = claimed.run
            assert (run.run_id, run.ordinal, run.epoch, run.last_seq) == (expected.run_id, expected.ordinal, 2, 0)
            assert (run.state, claimed.takeovers) == (types_pb2.RUN_STATE_RUNNING, 0)
            await executor.go_on(user, run.run_id, started(), thinking(), epoch=2)
            await executor.go_on(user, run.run_id, completed(), after=2, epoch=2)
    metadata = identities.metadata(user.tenant_id, user.user_id)
    log = await aio_stub.ReadEvents(
        state_pb2.ReadEventsRequest(run_id=third.run_id), metadata=metadata, timeout=TIMEOUT
    )
    assert log.events[0].agent_started.ordinal == 3
    run = (await aio_stub.GetRun(state_pb2.GetRunRequest(run_id=third.run_id), metadata=metadata, timeout=TIMEOUT)).run
    assert run.start_time.ToNanoseconds() >= run.create_time.ToNanoseconds() > 0


async def test_a_create_sent_again_after_somebody_claimed_its_run_gives_no_lease(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    head, create = await executor.start(user), executor.create(user)
    assert (await executor.send_one(create)).state == types_pb2.RUN_STATE_QUEUED
    async with (
        claiming(aio_stub, identities) as claimer,
        claiming(aio_stub, identities, executor.executor_id, credit=0),
    ):
        await executor.go_on(user, head, completed(), after=1)
        claimed = await claimer.next_claim()
        assert (claimed.run.run_id, claimed.run.state) == (create.run_id, types_pb2.RUN_STATE_RUNNING)
        again = await executor.send_one(create)
        assert (reason_of(again.status), again.state) == ("", types_pb2.RUN_STATE_QUEUED)
        await executor.go_on(user, create.run_id, started(), completed(), epoch=claimed.run.epoch)


async def test_an_input_reaches_the_holder_and_is_repeated_until_consumed(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    async with claiming(aio_stub, identities, executor.executor_id) as holder:
        run_id = await executor.start(user)
        stored = await cancel(aio_stub, identities, user, run_id, request_id="stop-1")
        for told in (await holder.next_input(), await holder.next_input()):
            assert told == stored
        assert (stored.run_id, stored.tenant_id, stored.requested_by) == (run_id, user.tenant_id, user.user_id)
        assert (stored.request_id, stored.cancel.reason) == ("stop-1", "enough")
        await executor.go_on(user, run_id, cancelled(), after=1, consumed_request_ids=["stop-1"])
        assert await refused(aio_stub, identities, user, run_id) == "RUN_ENDED"
        # The first answer, though the run has ended since.
        assert await cancel(aio_stub, identities, user, run_id, request_id="stop-1") == stored


async def test_an_input_of_a_queued_run_makes_it_claimable_before_its_turn(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    async with claiming(aio_stub, identities, executor.executor_id) as claimer:
        head, second, third = await executor.send(*(executor.create(user) for _ in range(3)))
        await cancel(aio_stub, identities, user, second.run_id, request_id="stop-2")
        claimed = await claimer.next_claim()
        assert (claimed.run.run_id, claimed.run.state) == (second.run_id, types_pb2.RUN_STATE_QUEUED)
        assert [run_input.request_id for run_input in claimed.inputs] == ["stop-2"]
        begin = executor.append(user, second.run_id, started(), epoch=2)
        assert reason_of((await executor.send_one(begin)).status) == "TRANSITION_ILLEGAL"
        await executor.go_on(user, second.run_id, cancelled(), epoch=2, consumed_request_ids=["stop-2"])
        await executor.go_on(user, head.run_id, completed(), after=1)
        last = await claimer.next_claim()
        assert (last.run.run_id, last.run.state) == (third.run_id, types_pb2.RUN_STATE_RUNNING)
        await end(executor, user, last)
        again = await executor.send_one(executor.create(user))
        assert (again.state, again.ordinal) == (types_pb2.RUN_STATE_RUNNING, 4)


async def test_a_queued_run_whose_deadline_passes_is_claimable(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    async with claiming(aio_stub, identities, executor.executor_id) as claimer:
        deadline = Timestamp()
        deadline.FromDatetime(datetime.now(UTC) + timedelta(seconds=0.3))
        await executor.start(user)
        queued = await executor.send_one(executor.create(user, deadline=deadline))
        claimed = await claimer.next_claim()
        assert (claimed.run.run_id, claimed.run.state) == (queued.run_id, types_pb2.RUN_STATE_QUEUED)
        assert claimed.run.deadline == deadline
        await end(executor, user, claimed)


async def test_an_interrupting_run_asks_the_one_before_it_to_end(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    policy = {"policy": types_pb2.SESSION_POLICY_INTERRUPT}
    async with claiming(aio_stub, identities, executor.executor_id) as claimer:
        run_id = await executor.start(user, **policy)
        newer = await executor.send_one(executor.create(user, **policy))
        assert newer.state == types_pb2.RUN_STATE_QUEUED
        asked = await claimer.next_input()
        assert (asked.run_id, asked.HasField("cancel"), asked.requested_by) == (run_id, True, user.user_id)
        await executor.go_on(user, run_id, cancelled(), after=1, consumed_request_ids=[asked.request_id])
        claimed = await claimer.next_claim()
        assert claimed.run.run_id == newer.run_id
        await end(executor, user, claimed)


async def test_a_run_on_which_executors_die_one_after_the_other_is_ended(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    calls = [
        events_pb2.RunEvent(tool_executing=events_pb2.ToolExecuting(call_id=call_id, tool="t")) for call_id in "ab"
    ]
    done = events_pb2.RunEvent(tool_completed=events_pb2.ToolCompleted(call_id="a", tool="t"))
    await executor.go_on(user, run_id, *calls, done, after=1)
    last_seq = 4
    for takeover in (1, 2, 3):
        async with claiming(aio_stub, identities) as victim:
            claimed = await victim.next_claim()
            assert (claimed.run.run_id, claimed.takeovers, claimed.run.epoch) == (run_id, takeover, takeover + 1)
            # To say that it took over is no progress.
            await executor.go_on(user, run_id, RECOVERED, after=last_seq, epoch=claimed.run.epoch)
            last_seq += 1
    async with claiming(aio_stub, identities) as survivor:
        request = state_pb2.WaitRunRequest(run_id=run_id)
        metadata = identities.metadata(user.tenant_id, user.user_id)
        run = (await aio_stub.WaitRun(request, metadata=metadata, timeout=TIMEOUT)).run
        assert (run.state, run.error.reason, run.last_seq) == (types_pb2.RUN_STATE_FAILED, "RUN_POISONED", 9)
        assert survivor.claimed.empty()
    closing = (await log_of(aio_stub, identities, user, run_id))[-2].tool_completed
    assert (closing.call_id, closing.status, closing.error.reason) == ("b", types_pb2.TOOL_STATUS_ERROR, "RUN_POISONED")


async def test_progress_forgives_earlier_deaths(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    for takeover in (1, 2, 3, 4):
        async with claiming(aio_stub, identities) as victim:
            claimed = await victim.next_claim()
            assert (claimed.run.run_id, claimed.takeovers) == (run_id, takeover)
            await executor.go_on(user, run_id, thinking(), after=takeover, epoch=claimed.run.epoch)
    async with claiming(aio_stub, identities) as last:
        await end(executor, user, await last.next_claim())


async def test_nobody_holds_more_claimed_runs_than_its_credit(
    aio_stub: Any, identities: Identities, executor: Executor
) -> None:
    users = [person() for _ in range(5)]
    run_ids = {await executor.start(user): user for user in users}
    async with claiming(aio_stub, identities, credit=2) as claimer:
        seen = set()
        for _ in range(5):
            claimed = await claimer.next_claim()
            seen.add(claimed.run.run_id)
            assert claimer.claimed.qsize() <= 1
            await end(executor, run_ids[claimed.run.run_id], claimed)
        assert seen == set(run_ids)


async def test_a_claim_that_could_not_be_handed_over_is_made_again(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    async with claiming(aio_stub, identities) as claimer:
        run_id = await executor.start(user)
        assert (await claimer.next_claim()).run.run_id == run_id
        # The executor lives and beats, but this claim was lost with its stream.
        claimer.break_claims()
        async with claiming(aio_stub, identities) as other:
            claimed = await other.next_claim()
            # Nobody died on it: this is no further takeover.
            assert (claimed.run.run_id, claimed.run.epoch, claimed.takeovers) == (run_id, 3, 1)
            await end(executor, user, claimed)


async def test_who_does_not_beat_is_given_nothing(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    request = state_pb2.ClaimRunsRequest(executor_id=unique("mute"), credit=10)
    mute = aio_stub.ClaimRuns(request, metadata=identities.service_metadata(), timeout=TIMEOUT)
    async with claiming(aio_stub, identities) as claimer:
        claimed = await claimer.next_claim()
        assert claimed.run.run_id == run_id
        await end(executor, user, claimed)
    mute.cancel()
    with pytest.raises(asyncio.CancelledError):
        await mute.read()


async def test_only_the_users_own_run_can_be_asked_something(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    for stranger in (person(), person(user.tenant_id)):
        assert await refused(aio_stub, identities, stranger, run_id) == "RUN_NOT_FOUND"
    assert await refused(aio_stub, identities, user, new_id()) == "RUN_NOT_FOUND"
    assert await refused(aio_stub, identities, user, "nonsense") == "REQUEST_INVALID"
    await executor.go_on(user, run_id, completed(), after=1)


async def test_a_beat_needs_an_executor(aio_stub: Any, identities: Identities) -> None:
    call = aio_stub.Heartbeat(metadata=identities.service_metadata(), timeout=TIMEOUT)
    await call.write(state_pb2.HeartbeatRequest(beat=1))
    with pytest.raises(grpc.RpcError) as raised:
        await call.read()
    assert error_of(raised.value).reason == "REQUEST_INVALID"


def test_a_stream_that_breaks_while_its_first_answer_is_on_the_way_ends_with_a_reason(
    grpc_channel: grpc.Channel, identities: Identities
) -> None:
    beat = state_pb2.HeartbeatRequest(executor_id=unique("executor"), beat=1).SerializeToString()
    multi: Any = grpc_channel.stream_stream("/mainspring.v1.StateService/Heartbeat")

    def reason(_: int) -> str:
        with pytest.raises(grpc.RpcError) as raised:
            list(multi(iter([beat, b"no message"]), metadata=identities.service_metadata(), timeout=TIMEOUT))
        return error_of(raised.value).reason

    with ThreadPoolExecutor(STREAMS) as threads:
        assert set(threads.map(reason, range(STREAMS))) == {"REQUEST_INVALID"}
