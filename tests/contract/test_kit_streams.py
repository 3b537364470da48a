"""Batched streams over a real wire: order, re-sending, moving to another instance; and the guard around calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import grpc
import pytest
from mainspring.tokens import user_token
from mainspring.v1 import state_pb2 as pb
from mainspring.v1 import state_pb2_grpc as rpc
from mainspring_kit import telemetry
from mainspring_kit.channel import Peer
from mainspring_kit.config import ServiceSettings
from mainspring_kit.errors import from_rpc_error
from mainspring_kit.identity import ServiceTokens, UserExecutionContext, current_context, new_id
from mainspring_kit.interceptors import CALLS_PER_USER_MAX
from mainspring_kit.server import Service, serving
from mainspring_kit.streams import BatchPool, Replies, serve_batches
from mainspring_kit.tasks import background

from test_framework.waiting import wait_until

pytestmark = pytest.mark.contract

AUTH, SERVICE = "dev-" + "a" * 40, "dev-" + "s" * 40


class Recorder(rpc.StateServiceServicer):
    """Answers every append when told to, and remembers what came in which order."""

    def __init__(self, state_id: str) -> None:
        self.state_id = state_id
        self.seen: list[str] = []
        self.answers = True
        self.waiting = 0
        self.release = asyncio.Event()
        self.replies: Replies[pb.AppendResult] | None = None

    async def Append(
        self, request_iterator: AsyncIterator[pb.AppendRequest], context: object
    ) -> AsyncIterator[pb.AppendResponse]:
        yield pb.AppendResponse(state_id=self.state_id)
        replies = self.replies = Replies[pb.AppendResult]("appends", 8_192)

        def receive(frame: pb.AppendRequest) -> None:
            replies.expect(len(frame.appends))
            for item in frame.appends:
                self.seen.append(item.append_id)
                if self.answers:
                    replies.put(pb.AppendResult(item_id=item.item_id, run_id=item.run_id))

        async for response in serve_batches(
            request_iterator, replies, receive=receive, frame=lambda items: pb.AppendResponse(results=items)
        ):
            yield response

    async def Heartbeat(
        self, request_iterator: AsyncIterator[pb.HeartbeatRequest], context: object
    ) -> AsyncIterator[pb.HeartbeatResponse]:
        while True:
            response = pb.HeartbeatResponse()
            response.inputs.add(run_id="x" * 500_000)
            yield response

    async def WaitRun(self, request: pb.WaitRunRequest, context: object) -> pb.WaitRunResponse:
        self.waiting += 1
        await self.release.wait()
        return pb.WaitRunResponse()

    async def GetRun(self, request: pb.GetRunRequest, context: object) -> pb.GetRunResponse:
        response = pb.GetRunResponse()
        response.run.tenant_id = current_context().tenant_id
        response.run.user_id = current_context().user_id
        return response

    async def ListRuns(self, request: pb.ListRunsRequest, context: object) -> pb.ListRunsResponse:
        raise ZeroDivisionError("a fault of ours")

    async def ClaimRuns(self, request: pb.ClaimRunsRequest, context: object) -> AsyncIterator[pb.ClaimRunsResponse]:
        yield pb.ClaimRunsResponse()
        raise ZeroDivisionError("a fault of ours in mid-stream")


Recorder.__abstractmethods__ = frozenset()  # what is not overridden answers UNIMPLEMENTED, as in the services


class Instances:
    """Servers that can be stopped one by one, each with its recorder."""

    def __init__(self) -> None:
        self.recorders: list[Recorder] = []
        self.addresses: list[str] = []
        self._stacks: list[AsyncExitStack] = []

    async def start(self, *, listen: str = "127.0.0.1:0") -> Recorder:
        recorder = Recorder(f"state-{len(self.recorders)}")  # type: ignore[abstract]  # serves a part of the contract
        settings = ServiceSettings(
            listen=listen, auth_secret=AUTH, service_secret=SERVICE, environment="development", drain_seconds=0
        )
        service = Service(
            pb.DESCRIPTOR.services_by_name["StateService"], rpc.add_StateServiceServicer_to_server, recorder
        )
        stack = AsyncExitStack()
        port = await stack.enter_async_context(serving(settings, [service]))
        self.recorders.append(recorder)
        self.addresses.append(f"127.0.0.1:{port}")
        self._stacks.append(stack)
        return recorder

    async def stop(self, number: int) -> None:
        await self._stacks[number].aclose()

    async def stop_all(self) -> None:
        for stack in self._stacks:
            await stack.aclose()


@pytest.fixture
async def instances() -> AsyncIterator[Instances]:
    found = Instances()
    yield found
    await found.stop_all()


def pool_to(peer: Peer) -> BatchPool[pb.Append, pb.AppendResult]:
    return BatchPool(
        peer,
        "appends",
        open_call=lambda channel: rpc.StateServiceStub(channel).Append(**peer.stream()),
        frame=lambda items: pb.AppendRequest(appends=items),
        unpack=lambda response: (response.results, response.state_id),
    )


def append(number: int) -> pb.Append:
    return pb.Append(append_id=str(number), run_id=f"run-{number}")


async def test_items_go_to_the_named_instance_in_order(instances: Instances) -> None:
    first, second = await instances.start(), await instances.start()
    async with Peer(",".join(instances.addresses), ServiceTokens(SERVICE, "tester")) as peer:
        pool = pool_to(peer)
        async with background(pool.run()), asyncio.timeout(10):
            await asyncio.gather(*(pool.post(append(number)) for number in range(20)))
            while {link.instance_id for link in pool._links.values()} != {"state-0", "state-1"}:
                await asyncio.wait_for(pool.post(append(99)), 1)
            first.seen.clear()
            second.seen.clear()
            answers = await asyncio.gather(
                *(pool.post(append(number), instance_id="state-1") for number in range(1_500))
            )
    assert [answer.run_id for answer in answers] == [f"run-{number}" for number in range(1_500)]
    assert second.seen == [str(number) for number in range(1_500)]
    assert first.seen == []


async def test_unanswered_items_move_in_order_when_an_instance_dies(instances: Instances) -> None:
    first, second = await instances.start(), await instances.start()
    async with Peer(",".join(instances.addresses), ServiceTokens(SERVICE, "tester")) as peer:
        pool = pool_to(peer)
        async with background(pool.run()), asyncio.timeout(20):
            while {link.instance_id for link in pool._links.values()} != {"state-0", "state-1"}:
                await asyncio.wait_for(pool.post(append(99)), 1)
            second.seen.clear()
            first.answers = False
            futures = [pool.post(append(number), instance_id="state-0") for number in range(10)]
            while len(first.seen) < 10:
                await asyncio.wait_for(pool.post(append(99), instance_id="state-1"), 1)
            second.seen.clear()
            await instances.stop(0)
            await asyncio.gather(*futures)
            futures = [pool.post(append(number), instance_id="state-0") for number in range(10, 13)]
            await asyncio.gather(*futures)
    assert second.seen == [str(number) for number in range(13)], "the successor got everything, once, in order"


async def test_what_follows_goes_where_the_unanswered_went(
    instances: Instances,
) -> None:
    first, second = await instances.start(), await instances.start()
    async with Peer(",".join(instances.addresses), ServiceTokens(SERVICE, "tester")) as peer:
        pool = pool_to(peer)

        def both_are_named() -> bool:
            return {link.instance_id for link in pool._links.values() if link.is_live} == {"state-0", "state-1"}

        async with background(pool.run()):
            await wait_until(both_are_named)
            first.answers = second.answers = False
            before = append(1)
            pool.post(before, instance_id="state-0")
            await wait_until(lambda: first.seen == ["1"])
            assert first.replies is not None
            first.replies.outbox.close()  # the stream breaks, the process lives
            await wait_until(lambda: second.seen == ["1"])
            await wait_until(both_are_named)
            pool.post(append(2), instance_id="state-0", after=before)
            await wait_until(lambda: len(first.seen) + len(second.seen) == 3)
    assert (first.seen, second.seen) == (["1"], ["1", "2"])


async def test_a_restarted_instance_gets_everything_unanswered_again(instances: Instances) -> None:
    first = await instances.start()
    async with Peer(instances.addresses[0], ServiceTokens(SERVICE, "tester")) as peer:
        pool = pool_to(peer)
        async with background(pool.run()), asyncio.timeout(20):
            await pool.post(append(0))
            first.answers = False
            futures = [pool.post(append(number)) for number in range(1, 4)]
            while len(first.seen) < 4:
                await asyncio.wait({asyncio.ensure_future(asyncio.wait_for(peer.addresses(), 1))})
            await instances.stop(0)
            futures.append(pool.post(append(4)))
            second = await instances.start(listen=instances.addresses[0])
            await asyncio.gather(*futures)
    assert second.seen == ["1", "2", "3", "4"]


async def test_a_users_call_runs_as_the_user_and_nobody_else(instances: Instances) -> None:
    await instances.start()
    token = user_token(AUTH, tenant="acme", user="ada", roles=("viewer",), ttl_seconds=60)
    forged = UserExecutionContext(tenant_id="acme", user_id="eve", request_id=new_id()).to_message()
    async with grpc.aio.insecure_channel(instances.addresses[0]) as channel:
        response = await rpc.StateServiceStub(channel).GetRun(
            pb.GetRunRequest(run_id="r"),
            metadata=(
                ("authorization", f"Bearer {token}"),
                ("mainspring-context-bin", forged.SerializeToString()),
            ),
        )
        assert (response.run.tenant_id, response.run.user_id) == ("acme", "ada")


async def test_refusals_carry_their_reason(instances: Instances) -> None:
    await instances.start()
    viewer = user_token(AUTH, tenant="acme", user="ada", roles=("viewer",), ttl_seconds=60)
    async with Peer(instances.addresses[0], ServiceTokens(SERVICE, "tester")) as peer:
        stub = rpc.StateServiceStub(peer.channel)

        async def reason(call: object) -> str:
            with pytest.raises(grpc.RpcError) as caught:
                await call  # type: ignore[misc]  # any awaitable call
            error = from_rpc_error(caught.value)
            return f"{error.code.name} {error.reason_name}"

        bearer = (("authorization", f"Bearer {viewer}"),)
        assert await reason(stub.GetRun(pb.GetRunRequest())) == "UNAUTHENTICATED TOKEN_MISSING"
        nonsense = (("authorization", "Bearer nonsense"),)
        assert await reason(stub.GetRun(pb.GetRunRequest(), metadata=nonsense)) == "UNAUTHENTICATED TOKEN_INVALID"
        assert (
            await reason(stub.CreateSession(pb.CreateSessionRequest(), metadata=bearer))
            == "PERMISSION_DENIED ROLE_REQUIRED"
        )
        assert await reason(stub.GetRun(pb.GetRunRequest(), **peer.call())) == "INVALID_ARGUMENT CONTEXT_INVALID"
        too_long = pb.GetRunRequest(run_id="x" * 129)
        assert await reason(stub.GetRun(too_long, metadata=bearer)) == "INVALID_ARGUMENT REQUEST_INVALID"
        assert await reason(stub.ListRuns(pb.ListRunsRequest(), metadata=bearer)) == "INTERNAL INTERNAL"
        assert await reason(stub.GetCall(pb.GetCallRequest(), metadata=bearer)) == "UNIMPLEMENTED NOT_IMPLEMENTED"
        stream = stub.ClaimRuns(pb.ClaimRunsRequest(executor_id="e", credit=1), **peer.stream())
        assert await stream.read() == pb.ClaimRunsResponse()
        assert await reason(stream.read()) == "INTERNAL INTERNAL"


async def test_a_users_calls_are_bounded_and_nobody_elses_with_them(instances: Instances) -> None:
    await instances.start()
    ada, eve = (
        (("authorization", f"Bearer {user_token(AUTH, tenant='acme', user=name, roles=('viewer',), ttl_seconds=60)}"),)
        for name in ("ada", "eve")
    )
    async with grpc.aio.insecure_channel(instances.addresses[0]) as channel, asyncio.timeout(20):
        stub = rpc.StateServiceStub(channel)
        waits = [stub.WaitRun(pb.WaitRunRequest(run_id="r"), metadata=ada) for _ in range(CALLS_PER_USER_MAX)]
        while instances.recorders[0].waiting < CALLS_PER_USER_MAX:
            await stub.GetRun(pb.GetRunRequest(run_id="r"), metadata=eve)
        with pytest.raises(grpc.RpcError) as caught:
            await stub.GetRun(pb.GetRunRequest(run_id="r"), metadata=ada)
        assert from_rpc_error(caught.value).reason_name == "QUEUE_FULL"
        instances.recorders[0].release.set()
        await asyncio.gather(*waits)
        await stub.GetRun(pb.GetRunRequest(run_id="r"), metadata=ada)


async def test_a_reader_that_goes_away_is_no_fault_of_ours(instances: Instances) -> None:
    await instances.start()
    method = "/mainspring.v1.StateService/Heartbeat"
    ends = {code: telemetry.RPC_COUNT.labels(method, code)._value.get for code in ("CANCELLED", "INTERNAL")}
    before = {code: count() for code, count in ends.items()}
    async with asyncio.timeout(20):
        for _ in range(20):
            async with Peer(instances.addresses[0], ServiceTokens(SERVICE, "tester")) as peer:
                call = rpc.StateServiceStub(peer.instance_channel(instances.addresses[0])).Heartbeat(**peer.stream())
                await call.read()
        await wait_until(
            lambda: sum(count() for count in ends.values()) == sum(before.values()) + 20, what="twenty streams' ends"
        )
    assert ends["INTERNAL"]() == before["INTERNAL"]


async def test_a_stream_that_exceeds_its_credit_is_refused(instances: Instances) -> None:
    recorder = await instances.start()
    recorder.answers = False
    async with Peer(instances.addresses[0], ServiceTokens(SERVICE, "tester")) as peer:
        call = rpc.StateServiceStub(peer.channel).Append(**peer.stream() | {"wait_for_ready": True})
        named = await call.read()
        assert isinstance(named, pb.AppendResponse)
        assert named.state_id == "state-0"
        for _ in range(17):
            await call.write(pb.AppendRequest(appends=[append(number) for number in range(512)]))
        with pytest.raises(grpc.RpcError) as caught:
            await call.read()
        assert from_rpc_error(caught.value).reason_name == "QUEUE_FULL"
