"""Several state processes over one database: whoever is asked, a run is the same, with Redis and without."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any

import asyncpg
import grpc
import pytest
from mainspring.v1 import state_pb2, state_pb2_grpc, types_pb2
from mainspring_kit import redis, server
from mainspring_kit.identity import UserExecutionContext
from mainspring_state.__main__ import wired
from mainspring_state.config import StateSettings
from mainspring_state.core import hearing
from mainspring_state.core.append import check
from mainspring_state.store.log import Batch, LogWriter
from mainspring_state.store.wire import CHANNEL, Wire

from test_framework.grpc_testing import free_address
from test_framework.identities import Identities, unique
from test_framework.loop_thread import LoopThread
from tests.contract.state_calls import (
    TIMEOUT,
    TIMES,
    Executor,
    Watcher,
    cancelled,
    completed,
    executing,
    reason_of,
    thinking,
)

pytestmark = pytest.mark.contract
grpc_service = "State"

# Any in this module: generated stubs have no common base.

Serve = Callable[..., AbstractContextManager[str]]
NOWHERE = "redis://127.0.0.1:1"


@pytest.fixture(scope="module")
def serve(grpc_loop: LoopThread, contract_environment: dict[str, Any]) -> Serve:
    """Serves one more state process's worth of service while the block runs, and gives its address."""

    @asynccontextmanager
    async def serving(settings: StateSettings) -> AsyncIterator[None]:
        service = state_pb2.DESCRIPTOR.services_by_name["StateService"]
        add = state_pb2_grpc.add_StateServiceServicer_to_server
        async with (
            wired(settings) as (servicer, engine),
            server.serving(settings, [server.Service(service, add, servicer)], ready=lambda: engine.is_ready),
        ):
            yield
            engine.drain()

    @contextmanager
    def open_one(**changes: Any) -> Iterator[str]:
        address = free_address()
        settings = StateSettings(
            **{**contract_environment, **TIMES, "listen": address, "drain_seconds": 5.0, **changes}
        )
        with grpc_loop.opened(lambda: serving(settings)):
            yield address

    return open_one


@pytest.fixture(scope="module")
def mute_redis() -> Iterator[str]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(scope="module", params=["redis", "no redis", "mute redis"])
def other_address(request: pytest.FixtureRequest, serve: Serve, mute_redis: str) -> Iterator[str]:
    """A second state process: one that hears the first, and those that cannot."""
    changes = {"redis": {}, "no redis": {"redis_url": NOWHERE}, "mute redis": {"redis_url": mute_redis}}
    with serve(**changes[request.param]) as address:
        yield address


@pytest.fixture
async def other_stub(other_address: str) -> AsyncIterator[Any]:
    """A stub of the second process."""
    async with grpc.aio.insecure_channel(other_address) as channel:
        yield state_pb2_grpc.StateServiceStub(channel)


async def test_a_watcher_elsewhere_sees_what_is_appended_here(
    other_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    watchers = [Watcher(other_stub, identities.metadata(user.tenant_id, user.user_id)) for _ in range(3)]
    for watcher in watchers:
        await watcher.subscribe(run_id)
        await watcher.until_caught_up()
    for seq in range(1, 30):
        await executor.go_on(user, run_id, thinking(), after=seq)
    await executor.go_on(user, run_id, completed(), after=30)
    for watcher in watchers:
        await watcher.until_seq(31)
        assert watcher.seqs() == list(range(1, 32))
        watcher.close()


async def test_a_watcher_elsewhere_sees_what_was_committed_when_the_answer_got_lost(
    other_stub: Any,
    identities: Identities,
    executor: Executor,
    user: UserExecutionContext,
    contract_environment: dict[str, Any],
) -> None:
    run_id = await executor.start(user)
    watcher = Watcher(other_stub, identities.metadata(user.tenant_id, user.user_id))
    await watcher.subscribe(run_id)
    await watcher.until_caught_up()
    last = executor.append(user, run_id, completed(), after=1)
    # As if the connection had broken behind the commit: the process sends the append again, and it is a repeat.
    writer = await LogWriter.open(contract_environment["database_url"])
    await writer.commit(Batch([check(last)]))
    writer.close()
    assert reason_of((await executor.send_one(last)).status) == ""
    await watcher.until_seq(2)
    watcher.close()


@pytest.mark.parametrize(
    "body",
    [
        hearing.FRAME + bytes(8) + b"\xff\xff\xff",
        hearing.FRAME + bytes(8) + state_pb2.FollowResponse(deliveries=[state_pb2.Delivery()]).SerializeToString(),
        hearing.INPUT + bytes(8),
        hearing.INPUT + bytes(8) + b"\x00\x02\xff\xff\xff",
        b"?" * 9,
        b"",
    ],
)
async def test_what_cannot_be_read_on_redis_harms_nobody(
    body: bytes,
    contract_environment: dict[str, Any],
    other_stub: Any,
    identities: Identities,
    executor: Executor,
    user: UserExecutionContext,
) -> None:
    async with redis.connect(contract_environment["redis_url"]) as client:
        await client.publish(CHANNEL, b"x" * 36 + body)
    run_id = await executor.start(user)
    watcher = Watcher(other_stub, identities.metadata(user.tenant_id, user.user_id))
    await watcher.subscribe(run_id)
    await executor.go_on(user, run_id, completed(), after=1)
    await watcher.until_seq(2)
    assert watcher.seqs() == [1, 2]
    watcher.close()


async def test_a_run_whose_executor_moves_to_another_process_is_seen_whole_by_all(
    aio_stub: Any, other_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    metadata = identities.metadata(user.tenant_id, user.user_id)
    here, there = Watcher(aio_stub, metadata), Watcher(other_stub, metadata)
    run_id = await executor.start(user)
    for watcher in (here, there):
        await watcher.subscribe(run_id)
        await watcher.until_caught_up()
    async with executing(other_stub, identities) as moved:
        seq = 1
        for _ in range(10):
            for sender in (executor, moved):
                await sender.go_on(user, run_id, thinking(), after=seq)
                seq += 1
        # What was sent to one process and never answered is sent to the other: stored once all the same.
        last = executor.append(user, run_id, completed(), after=seq)
        for sender in (executor, moved):
            assert reason_of((await sender.send_one(last)).status) == ""
    for watcher in (here, there):
        await watcher.until_seq(seq + 1)
        assert watcher.seqs() == list(range(1, seq + 2))
        watcher.close()


async def test_a_create_sent_again_to_another_process_makes_one_run(
    other_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    follower_id = unique("gateway")
    watcher = Watcher(other_stub, identities.service_metadata())
    await watcher.ask(follower_id=follower_id)
    await watcher.until(lambda: bool(watcher.state_id))
    create = executor.create(user, follower_id=follower_id)
    async with executing(other_stub, identities) as moved:
        first, again = await asyncio.gather(executor.send_one(create), moved.send_one(create))
        for result in (first, again):
            assert (reason_of(result.status), result.run_id, result.ordinal) == ("", create.run_id, 1)
        await moved.go_on(user, create.run_id, completed(), after=1)
    await watcher.until_seq(2)
    assert watcher.seqs() == [1, 2]
    watcher.close()


async def test_one_session_at_two_processes_has_one_line(
    other_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    async with executing(other_stub, identities) as moved:
        answers = await asyncio.gather(
            executor.send(*(executor.create(user) for _ in range(20))),
            moved.send(*(moved.create(user) for _ in range(20))),
        )
    results = [result for answer in answers for result in answer]
    assert {reason_of(result.status) for result in results} == {""}
    assert sorted(result.ordinal for result in results) == list(range(1, 41))
    assert [result.state for result in results].count(types_pb2.RUN_STATE_RUNNING) == 1


async def test_a_run_that_leaves_the_line_in_the_moment_of_its_turn_holds_nobody_up(
    other_stub: Any,
    identities: Identities,
    executor: Executor,
    user: UserExecutionContext,
    contract_environment: dict[str, Any],
) -> None:
    owner = await asyncpg.connect(contract_environment["owner_database_url"])
    head = await executor.start(user)
    next_run, last_run = [(await executor.send_one(executor.create(user))).run_id for _ in range(2)]

    async def until_waiting(count: int) -> None:
        asked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%state.append%'"
        async with asyncio.timeout(TIMEOUT):
            while await owner.fetchval(asked) < count:
                await owner.execute("SELECT pg_sleep(0.02), pg_stat_clear_snapshot()")

    async with executing(other_stub, identities) as other:
        async with owner.transaction():
            await owner.execute("SELECT FROM state.queued WHERE run_id = $1 FOR UPDATE", next_run)
            ending = asyncio.ensure_future(executor.send_one(executor.append(user, head, completed(), after=1)))
            await until_waiting(1)
            leaving = asyncio.ensure_future(other.send_one(other.append(user, next_run, cancelled())))
            await until_waiting(2)
        assert [reason_of((await answer).status) for answer in (ending, leaving)] == ["", ""]
    line = await owner.fetchrow("SELECT head_run_id, waiting FROM state.sessions WHERE user_id = $1", user.user_id)
    ready = await owner.fetch("SELECT run_id FROM state.ready WHERE tenant_id = $1", user.tenant_id)
    await owner.close()
    assert line is not None and (str(line["head_run_id"]), line["waiting"]) == (last_run, 0)
    assert [str(row["run_id"]) for row in ready] == [last_run]


async def test_one_key_at_two_processes_names_one_run(
    other_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    async with executing(other_stub, identities) as moved:
        for number in range(10):
            fields = {"idempotency_key": f"k{number}", "request_hash": b"h", "session_id": unique("session")}
            one, two = await asyncio.gather(
                executor.send_one(executor.create(user, **fields)), moved.send_one(moved.create(user, **fields))
            )
            assert one.run_id == two.run_id
            assert sorted([one.repeated_key, two.repeated_key]) == [False, True]


async def test_a_wait_elsewhere_ends_with_the_run(
    other_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    metadata = identities.metadata(user.tenant_id, user.user_id)
    request = state_pb2.WaitRunRequest(run_id=run_id)
    async with asyncio.TaskGroup() as tasks:
        wait = tasks.create_task(_wait(other_stub, request, metadata))
        await executor.go_on(user, run_id, thinking(), after=1)
        await executor.go_on(user, run_id, completed(), after=2)
    assert wait.result().run.state == types_pb2.RUN_STATE_COMPLETED


async def test_an_input_given_elsewhere_reaches_the_holder(
    aio_stub: Any, other_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    beats = aio_stub.Heartbeat(metadata=identities.service_metadata(), timeout=TIMEOUT)
    await beats.write(state_pb2.HeartbeatRequest(executor_id=executor.executor_id, beat=1))
    assert (await beats.read()).beat == 1
    run_id = await executor.start(user)
    request = state_pb2.PutInputRequest(run_id=run_id, request_id="stop", cancel=state_pb2.CancelInput())
    await other_stub.PutInput(request, metadata=identities.metadata(user.tenant_id, user.user_id), timeout=TIMEOUT)
    told = await beats.read()
    assert [(run_input.run_id, run_input.request_id) for run_input in told.inputs] == [(run_id, "stop")]
    beats.cancel()


async def test_streams_move_when_a_process_stops(
    serve: Serve, aio_stub: Any, identities: Identities, executor: Executor, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    metadata = identities.metadata(user.tenant_id, user.user_id)
    stopping = serve()
    address = await asyncio.to_thread(stopping.__enter__)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = state_pb2_grpc.StateServiceStub(channel)
        watcher = Watcher(stub, metadata)
        await watcher.subscribe(run_id)
        await watcher.until_caught_up()
        async with executing(stub, identities) as moved:
            await moved.go_on(user, run_id, thinking(), after=1)
            request = state_pb2.WaitRunRequest(run_id=run_id)
            async with asyncio.TaskGroup() as tasks:
                wait = tasks.create_task(_wait(stub, request, metadata))
                await watcher.until_seq(2)
                await asyncio.to_thread(stopping.__exit__, None, None, None)
                with pytest.raises(grpc.RpcError) as raised:
                    await watcher.ended()
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert wait.result().run.state == types_pb2.RUN_STATE_RUNNING
    again = Watcher(aio_stub, metadata)
    await again.subscribe(run_id, after=watcher.seqs()[-1])
    await again.until_caught_up()
    await executor.go_on(user, run_id, completed(), after=2)
    await again.until_seq(3)
    assert watcher.seqs() + again.seqs() == [1, 2, 3]
    again.close()


# Any: as above.
async def _wait(stub: Any, request: state_pb2.WaitRunRequest, metadata: Any) -> Any:
    return await stub.WaitRun(request, metadata=metadata, timeout=TIMEOUT)


async def test_a_publication_that_is_cancelled_ends_so_at_whatever_moment(contract_environment: dict[str, Any]) -> None:
    wire = Wire(contract_environment["redis_url"])
    try:
        await wire.publish([b"first"])
        for turns in range(20):
            publishing = asyncio.ensure_future(wire.publish([b"next"]))
            for _ in range(turns):
                await asyncio.sleep(0)
            was_cancelled = publishing.cancel()
            await asyncio.wait([publishing])
            assert publishing.cancelled() == was_cancelled, turns
    finally:
        await wire.close()
