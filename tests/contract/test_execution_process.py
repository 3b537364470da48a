"""Execution as a process that has no peers: alive, not ready, clear about why, and quick to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mainspring.v1 import execution_pb2 as pb
from mainspring.v1 import execution_pb2_grpc as rpc

from test_framework.grpc_testing import error_of, free_address
from test_framework.identities import Identities, unique
from test_framework.waiting import wait_until

pytestmark = pytest.mark.contract

START_SECONDS = 20
STOP_SECONDS = 15


@asynccontextmanager
async def started(
    identities: Identities, **settings: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, grpc.aio.Channel]]:
    """An execution process whose peers are nowhere, once it lives; killed at the end if it still runs."""
    address, nowhere = free_address(), free_address()
    environment = {
        **os.environ,
        "MAINSPRING_LISTEN": address,
        "MAINSPRING_AUTH_SECRET": identities.auth_secret,
        "MAINSPRING_SERVICE_SECRET": identities.service_secret,
        "MAINSPRING_ENVIRONMENT": "development",
        **{f"MAINSPRING_{name}_TARGET": nowhere for name in ("REGISTRY", "DISPATCHER", "STATE")},
        **settings,
    }
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "mainspring_execution", env=environment, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        async with grpc.aio.insecure_channel(address) as channel:

            async def lives() -> bool:
                assert child.returncode is None, "the process ended instead of starting"
                return await health(channel, "liveness") == int(health_pb2.HealthCheckResponse.SERVING)

            await wait_until(lives, START_SECONDS)
            yield child, channel
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


async def health(channel: grpc.aio.Channel, service: str) -> int:
    try:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=2)
    except grpc.aio.AioRpcError:
        return 0
    return int(answer.status)


async def test_without_state_it_lives_is_not_ready_and_refuses_starts(identities: Identities) -> None:
    async with started(identities) as (_, channel):
        assert await health(channel, "readiness") == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await rpc.ExecutionServiceStub(channel).StartRun(
                pb.StartRunRequest(agent="lookup"), metadata=identities.metadata(unique("tenant"), "ann"), timeout=5
            )
        assert error_of(raised.value) == (grpc.StatusCode.UNAVAILABLE, "PEER_UNAVAILABLE", {"peer": "state"})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_stops_when_told_although_nobody_hears_its_farewell(
    identities: Identities, number: signal.Signals
) -> None:
    async with started(identities) as (child, _):
        start = time.monotonic()
        child.send_signal(number)
        assert await asyncio.wait_for(child.wait(), STOP_SECONDS) == 0
        assert time.monotonic() - start < 6.0


async def test_settings_that_are_wrong_are_all_named(identities: Identities) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAINSPRING_")}
    environment |= {"MAINSPRING_AUTH_SECRET": identities.auth_secret, "MAINSPRING_RUNS_MAX": "0"}
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "mainspring_execution", "serve", env=environment, stderr=asyncio.subprocess.PIPE
    )
    _, text = await asyncio.wait_for(child.communicate(), START_SECONDS)
    assert child.returncode == 2
    for name in ("SERVICE_SECRET", "RUNS_MAX", "REGISTRY_TARGET", "DISPATCHER_TARGET", "STATE_TARGET"):
        assert f"MAINSPRING_{name}" in text.decode()
