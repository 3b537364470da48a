"""A storm: processes and servers are killed at random, and every run that was asked for ends as it should."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import aiohttp
import pytest

from test_framework.agents import Spec, call, scripted_agent, step
from test_framework.identities import make_context, unique
from test_framework.rows import check_gapless
from test_framework.stack import Stack
from test_framework.user import User
from test_framework.waiting import wait_until
from test_framework.websocket_client import TERMINAL_TYPES, Frame, SocketClosedError, StreamClient, check_log

pytestmark = [pytest.mark.flow, pytest.mark.real_services, pytest.mark.long]

replicas = {"state": 2, "execution": 2, "gateway": 2}
USERS = 8
STORM_SECONDS = 60.0
CALM_SECONDS = 90.0
PAUSE_SECONDS = (0.2, 2.5)
TARGETS = (
    *[("state", 0), ("state", 1), ("execution", 0), ("execution", 1), ("gateway", 0), ("gateway", 1)] * 2,
    *[("dispatcher", 0), ("registry", 0), ("worker", 0), ("redis", 0), ("postgres", 0)],
)


def counting_agent() -> Spec:
    """Two keyed calls, each of which adds a line to a file, with a pure one between them."""
    return scripted_agent(
        "counting",
        step("One.", call("diagnostics.count", file="{{input.file}}", name="first")),
        step("And.", call("diagnostics.sleep", seconds=0.2), call("diagnostics.echo", value="{{input.value}}")),
        step("Two.", call("diagnostics.count", file="{{input.file}}", name="second")),
        step("Done.", result={"answer": "{{calls[2].result.value}}"}),
    )


@dataclass
class Weather:
    """What the storm has done so far, and how long it lasts."""

    end: float
    killed: list[str] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether no more kills come."""
        return time.monotonic() >= self.end


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [1, 2])
async def test_every_run_ends_as_it_should(flow_stack: Stack, tmp_path: Path, seed: int) -> None:
    await flow_stack.wait_ready()
    tenant_id = unique("tenant")
    weather = Weather(time.monotonic() + STORM_SECONDS)
    async with AsyncExitStack() as opened:
        users = [await opened.enter_async_context(User(flow_stack, make_context(tenant_id))) for _ in range(USERS)]
        await users[0].register(counting_agent())
        async with asyncio.timeout(STORM_SECONDS + CALM_SECONDS), asyncio.TaskGroup() as tasks:
            tasks.create_task(rage(flow_stack, weather, random.Random(seed)))
            work = [tasks.create_task(keep_running(user, weather, tmp_path / "effects")) for user in users]

    await flow_stack.wait_ready()
    logs = [log for task in work for log in task.result()]
    assert len(weather.killed) > STORM_SECONDS / PAUSE_SECONDS[1] / 2, weather.killed
    assert len(logs) > USERS
    for log in logs:
        check_log(log)
        assert log[-1]["type"] == "agent_completed", json.dumps([weather.killed, log])
        check_gapless(await flow_stack.rows.events(log[0]["run_id"]))
    runs = await flow_stack.rows.as_owner("SELECT run_id, state FROM state.runs WHERE tenant_id = $1", tenant_id)
    assert sorted(str(run["run_id"]) for run in runs) == sorted(log[0]["run_id"] for log in logs)
    effects = Counter(line.split()[1] for line in (tmp_path / "effects").read_text().splitlines())
    assert set(effects.values()) == {1}
    told = [call_id for log in logs for call_id in calls_that_succeeded(log)]
    assert len(told) > len(logs) and set(told) <= set(effects)
    for table in ("leases", "ready", "queued"):
        await wait_until(partial(_is_empty, flow_stack, table, tenant_id), what=f"an empty {table}")


def calls_that_succeeded(log: list[Frame]) -> list[str]:
    """The ids of the keyed calls that the log tells of as done."""
    done = [event["data"] for event in log if event["type"] == "tool_completed" and event["data"]["status"] == "ok"]
    return [data["call_id"] for data in done if data["tool"] == "diagnostics.count"]


async def rage(stack: Stack, weather: Weather, chance: random.Random) -> None:
    """Kills something at random, again and again, while the storm lasts."""
    never = asyncio.Event()
    while not weather.is_over:
        try:
            await asyncio.wait_for(never.wait(), chance.uniform(*PAUSE_SECONDS))
        except TimeoutError:
            name, index = chance.choice(TARGETS)
            await stack.kill(name, index=index)
            weather.killed.append(f"{name}.{index}")


async def keep_running(user: User, weather: Weather, effects: Path) -> list[list[Frame]]:
    """Runs the agent again and again while the storm lasts; returns each run's log as it came over all sockets."""
    logs: list[list[Frame]] = []
    while not weather.is_over:
        key = unique("key")
        frames: list[Frame] = []
        while not frames or frames[-1]["type"] not in TERMINAL_TYPES:
            try:
                async with user.stream(random.choice(user.stack.gateways)) as socket:
                    await _go_on(socket, frames, {"key": key, "file": str(effects), "value": key})
            except (SocketClosedError, aiohttp.ClientError, OSError, RefusedForNowError):
                await wait_until(lambda: _some_gateway_is_ready(user), CALM_SECONDS)
        logs.append(frames)
    return logs


class RefusedForNowError(Exception):
    """The gateway said that it can't now."""


async def _go_on(socket: StreamClient, frames: list[Frame], asked: dict[str, str]) -> None:
    """Starts the run under its key, or follows it from where the last socket broke, and takes down what comes."""
    if frames:
        answer = await socket.ask("follow", run_id=frames[0]["run_id"], after_seq=frames[-1]["seq"])
        run_id = frames[0]["run_id"]
    else:
        given = {"file": asked["file"], "value": asked["value"]}
        answer = await socket.ask("start", agent="counting", input=given, idempotency_key=asked["key"])
        run_id = answer.get("run_id", "")
    if answer["op"] == "error":
        if answer["code"] in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"):
            raise RefusedForNowError(answer)
        raise AssertionError(f"refused for good: {answer}")
    try:
        await socket.ended(run_id)
    finally:
        frames.extend(socket.events(run_id))


async def _some_gateway_is_ready(user: User) -> bool:
    try:
        return (await user.http("GET", "/readyz")).status == 200
    except (aiohttp.ClientError, OSError):
        return False


async def _is_empty(stack: Stack, table: str, tenant_id: str) -> bool:
    rows = await stack.rows.as_owner(f"SELECT run_id FROM state.{table} WHERE tenant_id = $1", tenant_id)
    return not rows
