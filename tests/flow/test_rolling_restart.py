"""All executors are restarted under load, one after the other: nothing is lost or made twice, nobody taken for dead."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from mainspring.v1 import events_pb2

from test_framework.agents import call, scripted_agent, step
from test_framework.identities import make_context, unique
from test_framework.stack import Stack
from test_framework.user import User
from test_framework.websocket_client import Frame, StreamClient, check_log

pytestmark = [pytest.mark.flow, pytest.mark.real_services]

replicas = {"execution": 2}
USERS = 8
END_SECONDS = 60.0


async def test_a_rolling_restart_of_all_executors_is_no_ones_death(healthy_stack: Stack, tmp_path: Path) -> None:
    counted = tmp_path / "effects"
    count = call("diagnostics.count", file="{{input.file}}", name="{{input.name}}")
    nap = call("diagnostics.sleep", seconds=0.3)
    tenant_id, is_over = unique("tenant"), asyncio.Event()
    async with AsyncExitStack() as opened:
        users = [await opened.enter_async_context(User(healthy_stack, make_context(tenant_id))) for _ in range(USERS)]
        await users[0].register(
            scripted_agent("steady", step("1", nap), step("2", count), step("3", nap), step("Done.", result=1)),
            scripted_agent("patient", step("Wait.", call("run.sleep", seconds=3)), step("Done.", result=1)),
        )

        async def work(socket: StreamClient, number: int) -> list[list[Frame]]:
            logs: list[list[Frame]] = []
            while not is_over.is_set():
                agent = "patient" if number % 4 == 0 else "steady"
                value = {"file": str(counted), "name": f"{number}-{len(logs)}"}
                run_id = await socket.start(agent, value)
                logs.append(await socket.ended(run_id, END_SECONDS))
            return logs

        async with asyncio.TaskGroup() as tasks:
            working = [tasks.create_task(work(await user.open_stream(), number)) for number, user in enumerate(users)]
            for index in range(replicas["execution"]):
                await healthy_stack.restart("execution", index=index)
            is_over.set()

    logs = [log for task in working for log in task.result()]
    handed_back = 0
    for log in logs:
        check_log(log)
        assert log[-1]["type"] == "agent_completed", log[-1]
        for row in await healthy_stack.rows.events(log[0]["run_id"]):
            recovered = events_pb2.RunEvent.FromString(row["event"])
            if recovered.HasField("run_recovered"):
                assert recovered.run_recovered.handed_back, "a run was taken from an executor that was alive"
                handed_back += 1
    assert handed_back
    effects = Counter(line.split()[0] for line in counted.read_text(encoding="utf-8").splitlines())
    steady = sum(len(task.result()) for number, task in enumerate(working) if number % 4)
    assert len(effects) == steady and set(effects.values()) == {1}
