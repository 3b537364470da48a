"""Two state processes and two gateways over one database: it makes no difference which one a watcher has met."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from mainspring.v1 import events_pb2, state_pb2

from test_framework.agents import echo_agent
from test_framework.gate import Gate, gated_agent
from test_framework.rows import check_gapless
from test_framework.stack import Stack
from test_framework.user import User
from test_framework.websocket_client import check_log

pytestmark = [pytest.mark.flow, pytest.mark.real_services]

replicas = {"state": 2, "gateway": 2}
END_SECONDS = 30
WATCHERS_PER_STATE = 2


async def watch(user: User, run_id: str, *, replica: int) -> list[events_pb2.RunEvent]:
    """Follows a run on one state process with the user's own token, from the first event to the last."""
    stub = await user.grpc_stub("State", replica)
    call = stub.Follow(metadata=user.metadata(), timeout=END_SECONDS)
    await call.write(state_pb2.FollowRequest(subscribe=[state_pb2.Subscribe(subscription_id=1, run_id=run_id)]))
    events: list[events_pb2.RunEvent] = []
    while not events or events[-1].WhichOneof("payload") != "agent_completed":
        frame = await call.read()
        assert frame is not grpc.aio.EOF, "the stream ended before the run did"
        for delivery in frame.deliveries:
            assert delivery.status.code == 0, delivery.status
            assert (delivery.run_id, delivery.user_id) == (run_id, user.context.user_id)
            events.extend(delivery.events)
    call.cancel()
    return events


async def test_watchers_of_both_state_processes_see_the_same_run(user: User, gate: Gate) -> None:
    await user.register(gated_agent())
    async with user.stream() as socket:
        run_id = await socket.start("gated", {"gate": gate.path, "value": 1})
        async with asyncio.TaskGroup() as tasks:
            watchers = [
                tasks.create_task(watch(user, run_id, replica=replica))
                for replica in (0, 1)
                for _ in range(WATCHERS_PER_STATE)
            ]
            await gate.wait_for(1)
            gate.open()
        frames = await socket.ended(run_id)

    check_log(frames)
    logs = [watcher.result() for watcher in watchers]
    assert [event.seq for event in logs[0]] == [frame["seq"] for frame in frames]
    assert all(log == logs[0] for log in logs)
    check_gapless(await user.stack.rows.events(run_id))


async def test_watchers_of_both_state_processes_see_the_run_without_redis(user: User, gate: Gate) -> None:
    await user.register(gated_agent())
    await user.stack.stop("redis")
    async with user.stream() as socket:
        run_id = await socket.start("gated", {"gate": gate.path, "value": 1})
        async with asyncio.TaskGroup() as tasks:
            watchers = [tasks.create_task(watch(user, run_id, replica=replica)) for replica in (0, 1)]
            await gate.wait_for(1)
            gate.open()
        frames = await socket.ended(run_id)
    await user.stack.start("redis")

    check_log(frames)
    assert [[event.seq for event in watcher.result()] for watcher in watchers] == [
        [frame["seq"] for frame in frames]
    ] * 2


async def test_a_run_is_followed_from_any_gateway(user: User, healthy_stack: Stack) -> None:
    await user.register(echo_agent())
    first, second = healthy_stack.gateways
    async with user.stream(first) as here, user.stream(second) as there:
        run_id = await here.start("echo", {"value": "seen from both"})
        await there.follow(run_id, after_seq=0)
        assert await here.ended(run_id) == await there.ended(run_id)

        # And resumed on the other one from the middle.
        async with user.stream(second) as late:
            await late.follow(run_id, after_seq=3)
            assert await late.ended(run_id) == here.events(run_id)[3:]


async def test_a_watcher_goes_on_when_its_state_process_dies(user: User, gate: Gate) -> None:
    await user.register(gated_agent())
    first, second = user.stack.gateways
    async with user.stream(first) as here, user.stream(second) as there:
        run_id = await here.start("gated", {"gate": gate.path, "value": 1})
        await there.follow(run_id, after_seq=0)
        await gate.wait_for(1)

        for index in (0, 1):
            await user.stack.kill("state", index=index)
            await user.stack.wait_ready()
        gate.open()
        frames = await here.ended(run_id, END_SECONDS)
        assert await there.ended(run_id, END_SECONDS) == frames

    check_log(frames)
    assert frames[-1]["type"] == "agent_completed"
