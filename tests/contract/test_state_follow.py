"""Follow over the wire: replay joined to live without gap or duplicate, for whoever may see the run and nobody else."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from mainspring.v1 import state_pb2, types_pb2
from mainspring_kit.identity import UserExecutionContext, new_id

from test_framework.grpc_testing import error_of
from test_framework.identities import Identities, unique
from tests.contract.state_calls import (
    Executor,
    Watcher,
    Wiring,
    completed,
    person,
    reason_of,
    thinking,
    wiring,
)

pytestmark = pytest.mark.contract
grpc_service = "State"

# Any in this module: generated stubs have no common base.


@pytest.fixture(scope="module")
def grpc_wiring(contract_environment: dict[str, Any]) -> Wiring:
    """The state service's own; its streams hold little, so that a slow reader is one soon."""
    return wiring(contract_environment, follow_deliveries_max=200, follow_bytes_max=1 << 20, tail_runs_max=50)


@pytest.fixture
async def watcher(aio_stub: Any, identities: Identities, user: UserExecutionContext) -> AsyncIterator[Watcher]:
    """The user's own Follow stream."""
    opened = Watcher(aio_stub, identities.metadata(user.tenant_id, user.user_id))
    yield opened
    opened.close()


@pytest.fixture
async def gateway(aio_stub: Any, identities: Identities) -> AsyncIterator[Watcher]:
    """A service's Follow stream."""
    opened = Watcher(aio_stub, identities.service_metadata())
    yield opened
    opened.close()


async def test_a_run_is_followed_from_its_first_event_to_its_last(
    executor: Executor, watcher: Watcher, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    await watcher.subscribe(run_id)
    await watcher.until_caught_up()
    assert (watcher.caught_up(), watcher.seqs(number=1)) == ([1], [1])
    await executor.go_on(user, run_id, thinking(), thinking(), after=1)
    await executor.go_on(user, run_id, completed(), after=3)
    await watcher.until_seq(4)
    assert (watcher.seqs(), watcher.seqs(number=0)) == ([1, 2, 3, 4], [2, 3, 4])
    assert watcher.state_id
    live = watcher.deliveries[-1]
    assert (live.run_id, live.tenant_id, live.user_id) == (run_id, user.tenant_id, user.user_id)


async def test_a_replay_begins_after_the_seq_asked_for(
    executor: Executor, watcher: Watcher, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    await executor.go_on(user, run_id, *(thinking() for _ in range(5)), after=1)
    await watcher.subscribe(run_id, number=1, after=4)
    await watcher.subscribe(run_id, number=2, after=6)
    await watcher.subscribe(run_id, number=3, after=99)
    await watcher.until(lambda: all(watcher.caught_up(number) for number in (1, 2, 3)))
    assert [watcher.seqs(number=number) for number in (1, 2, 3)] == [[5, 6], [], []]
    assert [watcher.caught_up(number) for number in (1, 2, 3)] == [[6], [6], [6]]


async def test_an_ended_run_is_replayed_and_then_done(
    executor: Executor, watcher: Watcher, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    await executor.go_on(user, run_id, completed(), after=1)
    await watcher.subscribe(run_id)
    await watcher.half_close()
    await watcher.ended()
    assert (watcher.seqs(), watcher.caught_up()) == ([1, 2], [2])


async def test_a_long_log_that_left_the_memory_is_replayed_from_the_database(
    executor: Executor, watcher: Watcher, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    for after in range(1, 1_201, 60):
        await executor.go_on(user, run_id, *(thinking() for _ in range(60)), after=after)
    await watcher.subscribe(run_id)
    await watcher.until_caught_up()
    await executor.go_on(user, run_id, completed(), after=1_201)
    await watcher.until_seq(1_202)
    assert watcher.seqs() == list(range(1, 1_203))


async def test_replays_during_appends_join_the_live_events_exactly(
    executor: Executor, watcher: Watcher, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    for seq in range(1, 40):
        await watcher.subscribe(run_id, number=seq)
        await executor.go_on(user, run_id, thinking(), after=seq)
    await executor.go_on(user, run_id, completed(), after=40)
    await watcher.until(lambda: 41 in watcher.seqs() and all(watcher.caught_up(number) for number in range(1, 40)))
    for number in range(1, 40):
        seen: list[int] = []
        is_live = False
        for delivery in watcher.deliveries:
            if delivery.subscription_id == number or (is_live and delivery.subscription_id == 0):
                seen += [event.seq for event in delivery.events]
            is_live = is_live or (delivery.subscription_id == number and delivery.HasField("caught_up_seq"))
        assert seen == list(range(1, 42)), number


async def test_a_create_with_a_follower_is_followed_without_asking(
    executor: Executor, gateway: Watcher, user: UserExecutionContext
) -> None:
    follower_id = unique("gateway")
    await gateway.ask(follower_id=follower_id)
    other = await executor.start(person())
    await gateway.subscribe(other, user=user)
    await gateway.until(lambda: gateway.statuses() == ["RUN_NOT_FOUND"])
    run_id = await executor.start(user, follower_id=follower_id)
    await executor.go_on(user, run_id, completed(), after=1)
    await gateway.until_seq(2)
    assert (gateway.seqs(number=0), gateway.caught_up(0)) == ([1, 2], [])


async def test_a_repeated_create_is_followed_once(
    executor: Executor, gateway: Watcher, user: UserExecutionContext
) -> None:
    create = executor.create(user, follower_id=unique("gateway"))
    await executor.send_one(create)
    # The follower comes only now: the repeat finds the run made, and the follower without it.
    await gateway.ask(follower_id=create.create.follower_id)
    await gateway.until(lambda: bool(gateway.state_id))
    await gateway.subscribe(new_id(), number=9, user=user)
    await gateway.until(lambda: gateway.statuses(9) == ["RUN_NOT_FOUND"])
    await executor.send(create, create)
    await executor.go_on(user, create.run_id, completed(), after=1)
    await gateway.until_seq(2)
    assert gateway.seqs() == [1, 2]


async def test_a_queued_runs_follower_hears_of_its_end(
    executor: Executor, gateway: Watcher, user: UserExecutionContext
) -> None:
    follower_id = unique("gateway")
    await gateway.ask(follower_id=follower_id)
    await gateway.subscribe(new_id(), number=9, user=user)
    await gateway.until(lambda: bool(gateway.statuses(9)))
    head = await executor.start(user, follower_id=follower_id)
    queued = await executor.send_one(executor.create(user, follower_id=follower_id))
    assert queued.state == types_pb2.RUN_STATE_QUEUED
    await gateway.until(lambda: head in {delivery.run_id for delivery in gateway.deliveries})
    assert queued.run_id not in {delivery.run_id for delivery in gateway.deliveries}


async def test_an_unsubscribed_run_is_heard_no_more(
    executor: Executor, gateway: Watcher, user: UserExecutionContext
) -> None:
    follower_id = unique("gateway")
    await gateway.ask(follower_id=follower_id)
    await gateway.subscribe(new_id(), number=9, user=user)
    await gateway.until(lambda: bool(gateway.statuses(9)))
    made = await executor.start(user, follower_id=follower_id)
    other = person()
    asked = await executor.start(other)
    await gateway.subscribe(asked, number=1, user=other)
    await gateway.until_caught_up(1)
    last = person()
    await gateway.ask(
        unsubscribe=[state_pb2.Unsubscribe(run_id=made), state_pb2.Unsubscribe(subscription_id=1, run_id=asked)],
        subscribe=[state_pb2.Subscribe(subscription_id=2, run_id=new_id(), context=last.to_message())],
    )
    await gateway.until(lambda: bool(gateway.statuses(2)))
    await executor.go_on(user, made, completed(), after=1)
    await executor.go_on(other, asked, completed(), after=1)
    await executor.start(last, follower_id=follower_id)
    await gateway.until(lambda: last.user_id in {delivery.user_id for delivery in gateway.deliveries})
    assert 2 not in gateway.seqs()


async def test_a_foreign_unknown_or_malformed_run_is_refused_and_the_stream_goes_on(
    executor: Executor, watcher: Watcher, user: UserExecutionContext
) -> None:
    foreign = await executor.start(person())
    colleagues = await executor.start(person(user.tenant_id))
    for number, run_id in enumerate((foreign, colleagues, new_id(), "nonsense"), start=1):
        await watcher.subscribe(run_id, number=number)
        await watcher.until_refused(number)
        assert watcher.statuses(number) == ["RUN_NOT_FOUND"]
    own = await executor.start(user)
    await watcher.subscribe(own, number=5)
    await watcher.until_caught_up(5)
    assert watcher.seqs() == [1]


async def test_a_user_cannot_follow_in_anothers_name(
    executor: Executor, watcher: Watcher, user: UserExecutionContext
) -> None:
    other = person(user.tenant_id)
    await watcher.subscribe(await executor.start(other), number=1, user=other)
    await watcher.subscribe(await executor.start(user), number=2, user=user)
    await watcher.until(lambda: bool(watcher.statuses(1)) and bool(watcher.caught_up(2)))
    assert watcher.statuses(1) == ["CONTEXT_INVALID"]


async def test_a_service_must_name_the_user(executor: Executor, gateway: Watcher, user: UserExecutionContext) -> None:
    run_id = await executor.start(user)
    await gateway.subscribe(run_id)
    await gateway.until(lambda: gateway.statuses() == ["CONTEXT_INVALID"])


async def test_a_subscription_has_a_number_of_its_own(
    executor: Executor, watcher: Watcher, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    await watcher.subscribe(run_id, number=7)
    await watcher.until_caught_up(7)
    await watcher.subscribe(run_id, number=7)
    await watcher.until(lambda: watcher.statuses(7) == ["REQUEST_INVALID"])
    await watcher.subscribe(run_id, number=0)
    await watcher.until(lambda: watcher.statuses(0) == ["REQUEST_INVALID"])


async def test_a_user_has_no_follower_id(watcher: Watcher) -> None:
    await watcher.ask(follower_id="me")
    with pytest.raises(grpc.RpcError) as raised:
        await watcher.ended()
    assert error_of(raised.value).reason == "ROLE_REQUIRED"


async def test_a_users_stream_holds_nothing_private(
    executor: Executor, watcher: Watcher, gateway: Watcher, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    await executor.go_on(user, run_id, thinking(provider_state=b"secret"), after=1)
    for stream, named in ((watcher, None), (gateway, user)):
        await stream.subscribe(run_id, user=named)
        await stream.until_caught_up()
    await executor.go_on(user, run_id, thinking(provider_state=b"secret"), after=2)
    await watcher.until_seq(3)
    await gateway.until_seq(3)

    def secrets(stream: Watcher) -> set[bytes]:
        return {
            event.agent_thinking.provider_state
            for delivery in stream.deliveries
            for event in delivery.events
            if event.HasField("agent_thinking")
        }

    assert (secrets(watcher), secrets(gateway)) == ({b""}, {b"secret"})


async def test_a_reader_that_is_too_slow_loses_its_stream_and_nothing_else(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    metadata = identities.metadata(user.tenant_id, user.user_id)
    slow, quick = Watcher(aio_stub, metadata), Watcher(aio_stub, metadata)
    for stream in (slow, quick):
        await stream.subscribe(run_id)
        await stream.until_caught_up()
    seq = 1
    for _ in range(60):
        await executor.go_on(user, run_id, thinking("x" * (256 << 10)), after=seq)
        seq += 1
        await quick.until_seq(seq)
    with pytest.raises(grpc.RpcError) as raised:
        await slow.ended()
    error = error_of(raised.value)
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_CONSUMER")
    # What it has is one piece, and it can go on from there.
    assert slow.seqs() == list(range(1, len(slow.seqs()) + 1))
    again = Watcher(aio_stub, metadata)
    await again.subscribe(run_id, after=len(slow.seqs()))
    await again.until_caught_up()
    assert slow.seqs() + again.seqs() == list(range(1, seq + 1))
    quick.close()
    again.close()


async def test_a_replay_waits_for_its_reader(
    aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    for seq in range(1, 31):
        await executor.go_on(user, run_id, thinking("x" * (256 << 10)), after=seq)
    watcher = Watcher(aio_stub, identities.metadata(user.tenant_id, user.user_id))
    await watcher.subscribe(run_id)
    await watcher.until_caught_up()
    assert watcher.seqs() == list(range(1, 32))
    watcher.close()


async def test_a_user_can_hold_up_nobody_with_subscriptions(
    aio_stub: Any, identities: Identities, user: UserExecutionContext
) -> None:
    watcher = Watcher(aio_stub, identities.metadata(user.tenant_id, user.user_id))
    wanted = [state_pb2.Subscribe(subscription_id=number, run_id=new_id()) for number in range(1, 1_101)]
    await watcher.ask(subscribe=wanted)
    await watcher.until(lambda: len(watcher.deliveries) == len(wanted))
    reasons = Counter(reason_of(delivery.status) for delivery in watcher.deliveries)
    assert reasons == {"RUN_NOT_FOUND": 1_000, "QUEUE_FULL": 100}
    watcher.close()
