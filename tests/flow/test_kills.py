"""What survives when processes die: nothing that somebody was told is lost, and what had begun comes to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from test_framework.agents import echo_agent
from test_framework.gate import Gate, gated_agent
from test_framework.identities import make_context, unique
from test_framework.rows import check_gapless
from test_framework.stack import PROCESSES, Stack
from test_framework.user import User
from test_framework.websocket_client import Frame, SocketClosedError, check_log, types

pytestmark = [pytest.mark.flow, pytest.mark.real_services]

RUNS_IN_MID_TOOL = 20
END_SECONDS = 30.0


async def replay(user: User, run_id: str) -> list[Frame]:
    """The run's whole log over a new socket."""
    async with user.stream() as socket:
        await socket.follow(run_id, after_seq=0)
        return await socket.ended(run_id, END_SECONDS)


async def test_a_log_replays_the_same_after_state_and_gateway_were_killed(user: User) -> None:
    await user.register(echo_agent())
    async with user.stream() as socket:
        live = await socket.run("echo", {"value": "kept"})
    run_id = live[0]["run_id"]
    page = await user.http("GET", f"/v1/runs/{run_id}/events")

    await asyncio.gather(user.stack.kill("state"), user.stack.kill("gateway"))
    await user.stack.wait_ready()

    check_log(live)
    assert await replay(user, run_id) == live
    assert (await user.http("GET", f"/v1/runs/{run_id}/events")).body == page.body
    rows = await user.stack.rows.events(run_id)
    check_gapless(rows)
    assert len(rows) == len(live)


async def test_an_open_socket_goes_on_when_state_is_killed(user: User, gate: Gate) -> None:
    await user.register(gated_agent())
    async with user.stream() as socket:
        run_id = await socket.start("gated", {"gate": gate.path, "value": 1})
        await gate.wait_for(1)

        await user.stack.kill("state")
        gate.open()
        events = await socket.ended(run_id, END_SECONDS)

    check_log(events)
    assert types(events)[-1] == "agent_completed"


async def test_a_run_ends_and_replays_while_redis_is_away(user: User, gate: Gate) -> None:
    await user.register(gated_agent())
    async with user.stream() as socket:
        run_id = await socket.start("gated", {"gate": gate.path, "value": 1})
        await gate.wait_for(1)

        await user.stack.kill("redis")
        await user.stack.stop("redis")
        gate.open()
        live = await socket.ended(run_id, END_SECONDS)
        replayed = await replay(user, run_id)
        await user.stack.start("redis")

    check_log(live)
    assert types(live)[-1] == "agent_completed"
    assert replayed == live
    assert await replay(user, run_id) == live


async def test_a_run_ends_after_postgresql_was_killed(user: User, gate: Gate) -> None:
    await user.register(gated_agent())
    async with user.stream() as socket:
        run_id = await socket.start("gated", {"gate": gate.path, "value": 1})
        await gate.wait_for(1)
        before = {name: pids for name, pids in user.stack.pids.items() if name != "postgres"}

        await user.stack.kill("postgres")
        gate.open()
        live = await socket.ended(run_id, END_SECONDS)

    check_log(live)
    assert types(live)[-1] == "agent_completed"
    await user.stack.wait_ready()
    assert await replay(user, run_id) == live
    # Nobody else died of it.
    assert {name: pids for name, pids in user.stack.pids.items() if name != "postgres"} == before


async def test_runs_in_mid_tool_outlive_their_executor(healthy_stack: Stack, gate: Gate) -> None:
    tenant_id = unique("tenant")
    users = [User(healthy_stack, make_context(tenant_id)) for _ in range(RUNS_IN_MID_TOOL)]
    await users[0].register(gated_agent())
    sockets = [await someone.open_stream() for someone in users]
    run_ids = await asyncio.gather(
        *(socket.start("gated", {"gate": gate.path, "value": number}) for number, socket in enumerate(sockets))
    )
    await gate.wait_for(RUNS_IN_MID_TOOL)

    await healthy_stack.kill("execution")
    gate.open()
    logs = await asyncio.gather(
        *(socket.ended(run_id, END_SECONDS) for socket, run_id in zip(sockets, run_ids, strict=True))
    )

    call_ids = []
    for number, log in enumerate(logs):
        check_log(log)
        assert log[-1]["type"] == "agent_completed", log[-1]
        assert types(log).count("run_recovered") == 1
        assert types(log).count("tool_completed") == 1
        assert log[-1]["data"]["result"]["answer"] == number
        call_ids.append(log[-1]["data"]["result"]["call_id"])
        rows = await healthy_stack.rows.events(log[0]["run_id"])
        assert [row["seq"] for row in rows] == [event["seq"] for event in log]
    assert gate.effects() == sorted(call_ids)
    assert len(set(call_ids)) == RUNS_IN_MID_TOOL
    for someone in users:
        await someone.close()


@pytest.mark.parametrize("name", PROCESSES)
async def test_a_process_restarts_alone(user: User, gate: Gate, name: str) -> None:
    await user.register(gated_agent())
    async with user.stream() as socket:
        run_id = await socket.start("gated", {"gate": gate.path, "value": name})
        await gate.wait_for(1)
        before = dict(user.stack.pids)

        await user.stack.stop(name)
        serving = await health_of(user.stack, without=name)
        await user.stack.start(name)
        after = dict(user.stack.pids)
        gate.open()
        if name == "gateway":
            with pytest.raises(SocketClosedError) as closed:
                await socket.ended(run_id, END_SECONDS)
            assert closed.value.code == 1012

    assert serving == {other: True for other in PROCESSES if other != name}
    assert {other: after[other] for other in after if other != name} == {
        other: before[other] for other in before if other != name
    }
    assert after[name] != before[name]
    events = await replay(user, run_id)
    check_log(events)
    assert events[-1]["type"] == "agent_completed", events[-1]
    assert gate.effects() == [events[-1]["data"]["result"]["call_id"]]


async def health_of(stack: Stack, *, without: str) -> Mapping[str, bool]:
    """Whether each process but one says that it is alive: gRPC's `liveness`, the gateway's /healthz."""
    alive: dict[str, bool] = {}
    for name, addresses in stack.services.items():
        if name != without:
            async with grpc.aio.insecure_channel(addresses[0]) as channel:
                request = health_pb2.HealthCheckRequest(service="liveness")
                answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
                alive[name] = answer.status == health_pb2.HealthCheckResponse.SERVING
    if without != "gateway":
        someone = User(stack, make_context())
        alive["gateway"] = (await someone.http("GET", "/healthz")).status == 200
        await someone.close()
    return alive
