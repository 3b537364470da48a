"""What goes on when a process stands still and breaks no connection: another one takes over in seconds."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from test_framework.agents import call, scripted_agent, step
from test_framework.identities import make_context, unique
from test_framework.stack import Stack
from test_framework.user import User
from test_framework.websocket_client import check_log

pytestmark = [pytest.mark.flow, pytest.mark.real_services]

replicas = {"state": 2, "execution": 2, "dispatcher": 2, "worker": 2}
USERS = 8
# Issue 4 has 5 s for the takeover of a run under load; here are two of them in a row, and a stop of 10 s ends them too.
RUN_SECONDS = 9.0


@pytest.mark.parametrize("name", ["state", "execution", "dispatcher", "worker"])
async def test_runs_go_on_while_one_of_two_stands_still(healthy_stack: Stack, name: str) -> None:
    sleep = call("diagnostics.sleep", seconds=0.3)
    napping = scripted_agent("napping", step("A nap.", sleep), step("Done.", result={"answer": "{{input.value}}"}))
    tenant_id = unique("tenant")
    async with AsyncExitStack() as opened:
        users = [await opened.enter_async_context(User(healthy_stack, make_context(tenant_id))) for _ in range(USERS)]
        await users[0].register(napping)
        sockets = [await user.open_stream() for user in users]
        before = [await socket.start("napping", {"value": number}) for number, socket in enumerate(sockets)]

        async with healthy_stack.frozen(name), asyncio.timeout(RUN_SECONDS):
            logs = [await socket.ended(run_id, RUN_SECONDS) for socket, run_id in zip(sockets, before, strict=True)]
            async with asyncio.TaskGroup() as tasks:
                others = [tasks.create_task(socket.run("napping", {"value": 0})) for socket in sockets]

    for log in [*logs, *(other.result() for other in others)]:
        check_log(log)
        assert log[-1]["type"] == "agent_completed", log[-1]
