"""Batched streams: a bad item among good ones, and either end stalled: everything is answered, memory stays bounded."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf.message import Message
from google.rpc import status_pb2
from mainspring.v1 import dispatcher_pb2, execution_pb2, state_pb2, types_pb2
from mainspring_kit.channel import Peer
from mainspring_kit.errors import MainspringError, from_rpc_error
from mainspring_kit.identity import ServiceTokens, UserExecutionContext, new_id
from mainspring_kit.streams import BatchPool
from mainspring_kit.tasks import background

from test_framework.grpc_testing import error_of, free_address, stub_class
from test_framework.identities import make_context, unique
from test_framework.waiting import wait_until
from tests.contract.dispatcher_calls import Desk, HandWorker, tool
from tests.contract.matrix_calls import World, rpc_named
from tests.contract.state_calls import executing, reason_of

pytestmark = [pytest.mark.contract, pytest.mark.real_services]

WAIT_SECONDS = 30.0
MIB = 1 << 20
# What a process may hold for one caller that does not read: its own bound of a stream, and the wire's buffers.
STALLED_BYTES_MAX = 256 * MIB
FRAME_ITEMS = 512
FRAMES_MAX = 4_000


@pytest.fixture
async def stub(world: World) -> AsyncIterator[Callable[[str], Any]]:
    """Stubs of the stack's services on the test's loop; Any: they have no common base."""
    channels = {name: grpc.aio.insecure_channel(addresses[0]) for name, addresses in world.wire.stack.services.items()}
    yield lambda service: stub_class(service)(channels[service.lower()])
    for channel in channels.values():
        await channel.close()


@pytest.fixture
async def desk(world: World) -> AsyncIterator[Desk]:
    """Callers and workers of the test's own at the stack's dispatcher."""
    opened = Desk(world.wire.stack.services["dispatcher"][0], world.wire.identities)
    yield opened
    await opened.close()


def rss_bytes(world: World, service: str) -> int:
    """What a service's process holds."""
    used: int = psutil.Process(world.wire.stack.pids[service][0]).memory_info().rss
    return used


def start_item(item_id: int, context: UserExecutionContext, **fields: Any) -> execution_pb2.StartItem:
    """A right start, but for the fields (Any: StartRunRequest's)."""
    start = execution_pb2.StartRunRequest(**({"agent": "echo", "input": b'{"value": 1}'} | fields))
    return execution_pb2.StartItem(item_id=item_id, context=context.to_message(), start=start)


def own(world: World) -> UserExecutionContext:
    """The world's user with a run id and a session of the item's own."""
    return make_context(world.user.tenant_id, world.user.user_id)


def reasons(results: Iterable[Any]) -> dict[int, str]:
    """The reason of each item, nothing where it is OK; Any: results of any stream with a status."""
    return {result.item_id: reason_of(result.status) for result in results}


def tool_call(world: World, **fields: Any) -> dispatcher_pb2.ToolCall:
    """A right call, but for the fields; Any: ToolCall's."""
    made = dispatcher_pb2.ToolCall(
        context=own(world).to_message(), call_id=new_id(), tool="diagnostics.echo", arguments=b"{}", attempt=1
    )
    made.effect = types_pb2.EFFECT_CLASS_PURE
    made.MergeFrom(dispatcher_pb2.ToolCall(**fields))
    return made


def test_a_bad_start_among_good_ones_is_refused_alone(world: World) -> None:
    starts = [start_item(1, own(world)), start_item(2, own(world), agent="nobody"), start_item(3, own(world))]
    starts += [start_item(number, own(world)) for number in range(4, 10)]
    starts[3].context.tenant_id = "default"
    starts[4].context.user_id = ""
    starts[5].context.run_id = "not-a-uuid"
    starts[6].start.input = b"{"
    starts[7].ClearField("context")
    starts[8].start.agent = "x" * 100_000
    rpc = rpc_named("StartRuns")
    frames = world.wire.answers(rpc, [execution_pb2.StartRunsRequest(starts=starts)], world.metadata(rpc))
    results = [result for frame in frames for result in frame.results]
    assert len(results) == len(starts)
    assert reasons(results) == {
        1: "",
        2: "AGENT_NOT_FOUND",
        3: "",
        4: "CONTEXT_INVALID",
        5: "CONTEXT_INVALID",
        6: "REQUEST_INVALID",
        7: "REQUEST_INVALID",
        8: "CONTEXT_INVALID",
        9: "REQUEST_INVALID",
    }


async def test_a_bad_append_among_good_ones_is_refused_alone(world: World, stub: Callable[[str], Any]) -> None:
    async with executing(stub("State"), world.wire.identities) as executor:
        good = [executor.create(own(world)) for _ in range(2)]
        bad = [executor.create(own(world)) for _ in range(5)]
        bad[0].run_id = "no-uuid"
        bad[1].create.user_id = ""
        bad[2].create.session_id = "a\x00b"
        bad[3].events[0].seq = 7
        bad[4].tenant_id = ""
        answers = await executor.send(good[0], *bad, state_pb2.Append(), good[1])
    assert [reason_of(answer.status) for answer in answers] == ["", *["REQUEST_INVALID"] * 6, ""]


async def test_a_bad_call_among_good_ones_is_refused_alone(world: World, desk: Desk) -> None:
    calls = [tool_call(world), tool_call(world, tool="no.such"), tool_call(world), tool_call(world), tool_call(world)]
    calls += [tool_call(world, arguments=bytes(MIB + 1)), tool_call(world, call_id="c" * 200), tool_call(world)]
    calls[2].context.user_id = " "
    calls[3].ClearField("context")
    calls[4].effect = types_pb2.EFFECT_CLASS_UNSPECIFIED
    outcomes = await desk.calls().ask(*calls)
    assert [outcome.error.reason for outcome in outcomes] == [
        "",
        "TOOL_NOT_FOUND",
        "CONTEXT_INVALID",
        "CONTEXT_INVALID",
        "REQUEST_INVALID",
        "PAYLOAD_TOO_LARGE",
        "REQUEST_INVALID",
        "",
    ]


def test_a_bad_subscription_among_good_ones_is_refused_alone(world: World) -> None:
    rpc = rpc_named("Follow")
    ids = [world.run_id, "no-uuid", new_id(), world.run_id, "\x00" * 200, world.run_id]
    wanted = [state_pb2.Subscribe(subscription_id=number, run_id=run_id) for number, run_id in enumerate(ids, start=1)]
    wanted[3].context.CopyFrom(make_context().to_message())
    frames = world.wire.answers(rpc, [state_pb2.FollowRequest(subscribe=wanted)], world.metadata(rpc))
    told: dict[int, list[str]] = {}
    for delivery in (delivery for frame in frames for delivery in frame.deliveries):
        words = [reason_of(delivery.status)] if delivery.HasField("status") else []
        words += ["caught up"] if delivery.HasField("caught_up_seq") else []
        told.setdefault(delivery.subscription_id, []).extend(words)
    unknown, whole = ["RUN_NOT_FOUND"], ["caught up"]
    assert told == {1: whole, 2: unknown, 3: unknown, 4: ["CONTEXT_INVALID"], 5: unknown, 6: whole}


async def test_a_bad_outcome_among_good_ones_is_the_tools_failure_alone(world: World, desk: Desk) -> None:
    name = unique("matrix.tool").replace("-", "_")
    worker = await desk.attached(tool(name), tenant=world.user.tenant_id)
    calls = desk.calls()
    item_ids = await calls.send(*[tool_call(world, tool=name) for _ in range(3)])
    await worker.until(lambda: len(worker.calls) == 3)
    results = [
        dispatcher_pb2.WorkerResult(dispatch_id=call.dispatch_id, status=types_pb2.TOOL_STATUS_OK, result=b"1")
        for call in worker.calls
    ]
    results[1].result = b"{ no json"
    strange = dispatcher_pb2.WorkerResult(dispatch_id=1, status=types_pb2.TOOL_STATUS_OK, result=b"1")
    await worker.stream.write(dispatcher_pb2.AttachRequest(results=[strange, *results]))
    outcomes = await calls.outcomes(item_ids)
    assert [outcome.error.reason for outcome in outcomes] == ["", "TOOL_FAILED", ""]


NUMBERS = range(1, FRAME_ITEMS + 1)
BAD_APPENDS = state_pb2.AppendRequest(appends=[state_pb2.Append(item_id=number) for number in NUMBERS])
BAD_CALLS = dispatcher_pb2.CallToolsRequest(calls=[dispatcher_pb2.ToolCall(item_id=number) for number in NUMBERS])
BAD_STARTS = execution_pb2.StartRunsRequest(starts=[execution_pb2.StartItem(item_id=number) for number in NUMBERS])
BAD_SUBSCRIPTIONS = state_pb2.FollowRequest(
    subscribe=[state_pb2.Subscribe(subscription_id=number, run_id="x") for number in NUMBERS]
)


# Each frame's items are answered at once, so that only what the reader does not take piles up.
@pytest.mark.parametrize(
    ("name", "frame", "reason"),
    [
        ("Append", BAD_APPENDS, "QUEUE_FULL"),
        ("CallTools", BAD_CALLS, "QUEUE_FULL"),
        ("StartRuns", BAD_STARTS, "QUEUE_FULL"),
        ("Follow", BAD_SUBSCRIPTIONS, "SLOW_CONSUMER"),
    ],
)
async def test_a_caller_that_does_not_read_loses_its_stream_and_nothing_else(
    world: World, name: str, frame: Message, reason: str
) -> None:
    rpc = rpc_named(name)
    service = rpc.service.lower()

    def ended() -> int:
        lines = world.wire.stack.log_text(service).splitlines()
        return sum('"stream_closed"' in line and rpc.path in line for line in lines)

    before, ended_before = rss_bytes(world, service), ended()
    metadata = world.wire.identities.service_metadata()
    call = world.wire.open(rpc, itertools.repeat(frame, FRAMES_MAX), metadata, seconds=WAIT_SECONDS)
    await wait_until(lambda: ended() > ended_before, what=f"the end of {rpc}")
    assert rss_bytes(world, service) - before < STALLED_BYTES_MAX
    probe = rpc_named({"State": "GetRun", "Dispatcher": "CancelCalls", "Execution": "StartRun"}[rpc.service])
    assert world.wire.fault(probe, world.request(probe), world.metadata(probe)) is None

    with pytest.raises(grpc.RpcError) as raised:
        for _ in call:
            pass
    assert error_of(raised.value)[:2] == (grpc.StatusCode.RESOURCE_EXHAUSTED, reason)


async def test_beats_wait_for_their_turn_and_all_are_answered(world: World, stub: Callable[[str], Any]) -> None:
    """Each beat is stored before the next is read: the sender is held up, not the service."""
    call = stub("State").Heartbeat(metadata=world.wire.identities.service_metadata(), timeout=WAIT_SECONDS)
    executor_id, last = unique("matrix"), 300
    for beat in range(1, last + 1):
        await call.write(state_pb2.HeartbeatRequest(executor_id=executor_id, beat=beat, leaving=beat == last))
    await call.done_writing()
    assert [answer.beat async for answer in call if answer.beat] == list(range(1, last + 1))


async def test_a_worker_that_does_not_read_holds_up_nobody(world: World, desk: Desk) -> None:
    name, before = unique("matrix.tool").replace("-", "_"), rss_bytes(world, "dispatcher")
    deaf: HandWorker = await desk.attached(tool(name), tenant=world.user.tenant_id, concurrency=1_000)
    calls = desk.calls()
    for _ in range(60):
        await calls.send(tool_call(world, tool=name, arguments=b'{"a":"' + b"x" * (MIB - 16) + b'"}'))
    assert [outcome.error.reason for outcome in await desk.calls().ask(tool_call(world))] == [""]
    assert rss_bytes(world, "dispatcher") - before < STALLED_BYTES_MAX
    await deaf.until(lambda: len(deaf.calls) == 60)


async def test_a_reader_of_the_catalog_that_stalls_gets_everything_later(
    world: World, stub: Callable[[str], Any]
) -> None:
    call = stub("Registry").WatchCatalog(
        rpc_named("WatchCatalog").request_class(), metadata=world.wire.identities.service_metadata(), timeout=60
    )
    register = rpc_named("RegisterAgent")
    wanted = {world.wire.answer(register, _large_agent(), world.metadata(register)).agent.name for _ in range(40)}
    seen: set[str] = set()
    async with asyncio.timeout(WAIT_SECONDS):
        while not wanted <= seen:
            frame = await call.read()
            seen |= {entry.agent.name for entry in frame.agents}
    call.cancel()


def _large_agent() -> Any:
    name = unique("agent")
    text = "x" * 60_000
    document = (
        f'{{"apiVersion":"mainspring/v1","kind":"Agent","name":"{name}","instructions":"{text}",'
        '"model":{"provider":"scripted","script":[{"text":"t","result":1}]}}'
    )
    return rpc_named("RegisterAgent").request_class(document=document.encode())


class StalledServer:
    """Takes a stream, says that it stands, and reads nothing of it until it is told to."""

    def __init__(self) -> None:
        self.awake = asyncio.Event()
        self.read = 0

    async def serve(self, requests: Any, context: Any) -> AsyncIterator[state_pb2.AppendResponse]:
        """Answers every item; Any: grpc.aio's own types."""
        yield state_pb2.AppendResponse(state_id="stalled")
        await self.awake.wait()
        async for request in requests:
            self.read += len(request.appends)
            results = [
                state_pb2.AppendResult(item_id=append.item_id, status=status_pb2.Status()) for append in request.appends
            ]
            yield state_pb2.AppendResponse(results=results)


@asynccontextmanager
async def stalled_server() -> AsyncIterator[tuple[str, StalledServer]]:
    """A server of one Append stream that stalls, and its address."""
    stalled, address = StalledServer(), free_address()
    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(
        stalled.serve, state_pb2.AppendRequest.FromString, state_pb2.AppendResponse.SerializeToString
    )
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("mainspring.v1.StateService", {"Append": handler})]
    )
    server.add_insecure_port(address)
    await server.start()
    try:
        yield address, stalled
    finally:
        await server.stop(None)


async def test_a_server_that_stalls_is_waited_for_within_bounds() -> None:
    """The sender's queue is bounded and says so; once the server reads again, all that was taken is answered."""
    queue_max = 500
    async with stalled_server() as (address, stalled), Peer(address, ServiceTokens("s" * 32, "test")) as peer:
        pool: BatchPool[state_pb2.Append, state_pb2.AppendResult] = BatchPool(
            peer,
            "stalled",
            open_call=lambda channel: stub_class("State")(channel).Append(**peer.stream()),
            frame=lambda appends: state_pb2.AppendRequest(appends=appends),
            unpack=lambda response: (response.results, response.state_id),
            credit=100,
            queue_max=queue_max,
        )
        async with background(pool.run()), asyncio.timeout(WAIT_SECONDS):
            futures = []
            for _ in range(queue_max):
                # 64 KiB each: far more than the wire's buffers hold.
                futures.append(pool.post(state_pb2.Append(consumed_request_ids=["x" * 65_536])))
                await asyncio.sleep(0)
            with pytest.raises(MainspringError) as raised:
                pool.post(state_pb2.Append())
            assert raised.value.reason_name == "QUEUE_FULL"
            assert stalled.read == 0 and not any(future.done() for future in futures)
            stalled.awake.set()
            assert {(await future).status.code for future in futures} == {0}
            assert stalled.read == queue_max


async def test_a_stream_of_a_stopped_reader_ends_in_its_time(world: World, stub: Callable[[str], Any]) -> None:
    """A caller that neither reads nor writes ends with its deadline; the service keeps nothing of it."""
    call = stub("State").Append(metadata=world.wire.identities.service_metadata(), timeout=1.0)
    await call.write(BAD_APPENDS)
    with pytest.raises(grpc.RpcError) as raised:
        while await call.read() is not grpc.aio.EOF:
            pass
        await call
    assert from_rpc_error(raised.value).reason_name == "DEADLINE_EXCEEDED"
