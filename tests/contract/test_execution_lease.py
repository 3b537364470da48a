"""The executor's lease over a real wire: held while beats are answered, lost in time, kept by another instance."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from mainspring.v1 import state_pb2 as pb
from mainspring.v1 import state_pb2_grpc as rpc
from mainspring_execution.engine.lease import Lease
from mainspring_execution.peers import State
from mainspring_kit.channel import Peer
from mainspring_kit.config import ServiceSettings
from mainspring_kit.identity import ServiceTokens
from mainspring_kit.server import Service, serving
from mainspring_kit.tasks import background

from test_framework.waiting import wait_until

pytestmark = pytest.mark.contract

AUTH, SERVICE = "dev-" + "a" * 40, "dev-" + "s" * 40


class Beats(rpc.StateServiceServicer):
    """A state process of which only the heart is heard; it answers as long as it is told to."""

    def __init__(self) -> None:
        self.answers = True
        self.breaks = False
        self.lease_ms = 2_500
        self.heard: list[pb.HeartbeatRequest] = []
        self.inputs: list[pb.RunInput] = []

    async def Heartbeat(
        self, request_iterator: AsyncIterator[pb.HeartbeatRequest], context: object
    ) -> AsyncIterator[pb.HeartbeatResponse]:
        async for request in request_iterator:
            self.heard.append(request)
            if self.breaks:
                return
            if self.answers:
                response = pb.HeartbeatResponse(beat=request.beat, inputs=self.inputs)
                response.lease.FromMilliseconds(self.lease_ms)
                yield response


Beats.__abstractmethods__ = frozenset()  # what is not overridden answers UNIMPLEMENTED, as in the services


def answering() -> Beats:
    """A state process that answers beats."""
    return Beats()  # type: ignore[abstract]  # serves a part of the contract


@asynccontextmanager
async def beating(*processes: Beats) -> AsyncIterator[tuple[Lease, list[pb.RunInput]]]:
    """A lease that beats to these processes, and the inputs that it has brought."""
    settings = ServiceSettings(
        listen="127.0.0.1:0", auth_secret=AUTH, service_secret=SERVICE, environment="development", drain_seconds=0
    )
    descriptor = pb.DESCRIPTOR.services_by_name["StateService"]
    inputs: list[pb.RunInput] = []
    async with AsyncExitStack() as stack:
        ports = []
        for process in processes:
            service = Service(descriptor, rpc.add_StateServiceServicer_to_server, process)
            ports.append(await stack.enter_async_context(serving(settings, [service])))
        target = ",".join(f"127.0.0.1:{port}" for port in ports)
        peer = await stack.enter_async_context(Peer(target, ServiceTokens(SERVICE, "execution")))
        lease = Lease(State(peer), "executor-1")
        await stack.enter_async_context(background(lease.beat(inputs.append)))
        yield lease, inputs


async def test_a_lease_is_held_from_the_first_answered_beat() -> None:
    async with beating(process := answering()) as (lease, _):
        async with asyncio.timeout(5):
            await lease.wait_held()
        assert lease.is_held
        assert [request.executor_id for request in process.heard] == ["executor-1"]


async def test_a_lease_without_answers_is_lost_before_state_gives_it_away() -> None:
    async with beating(process := answering()) as (lease, _):
        await lease.wait_held()
        lapses = lease.lapses
        process.answers = False
        await wait_until(lambda: not lease.is_held, 5)
        process.answers = True
        async with asyncio.timeout(10):
            await lease.wait_held()
        assert lease.lapses == lapses + 1


async def test_a_lease_is_lost_with_its_stream_for_state_gives_it_away_sooner() -> None:
    process = answering()
    process.lease_ms = 60_000
    async with beating(process) as (lease, _):
        await lease.wait_held()
        lapses = lease.lapses
        process.breaks = True
        await wait_until(lambda: not lease.is_held, 10)
        process.breaks = False
        async with asyncio.timeout(10):
            await lease.wait_held()
        assert lease.lapses == lapses + 1, "somebody else may have had its runs"


async def test_beats_go_to_another_instance_when_one_falls_silent() -> None:
    first, second = answering(), answering()
    async with beating(first, second) as (lease, _):
        await lease.wait_held()
        silent, other = (first, second) if first.heard else (second, first)
        silent.answers = False
        await wait_until(lambda: other.heard, 10)
        async with asyncio.timeout(5):
            await lease.wait_held()


async def test_inputs_come_with_the_answers() -> None:
    process = answering()
    process.inputs = [pb.RunInput(request_id="r1", run_id="run-1")]
    async with beating(process) as (_, inputs):
        await wait_until(lambda: inputs)
        assert inputs[0] == process.inputs[0]


async def test_an_executor_that_leaves_says_so_and_beats_no_more() -> None:
    async with beating(process := answering()) as (lease, _):
        await lease.wait_held()
        async with asyncio.timeout(1.5):
            await lease.leave()
        assert [request.leaving for request in process.heard][-1]
        assert sum(request.leaving for request in process.heard) == 1
        assert not lease.is_held, "its runs are others' now"
