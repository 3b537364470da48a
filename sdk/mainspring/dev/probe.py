"""How a started process is found ready: gRPC health, the gateway's /readyz, free ports. Waits, decides nothing."""

from __future__ import annotations

import asyncio
import random
import socket
from pathlib import Path
from typing import Final

import aiohttp
import grpc

from mainspring.embedded.launch import StartError

READY_SECONDS_MAX: Final = 60.0

_POLL_SECONDS: Final = 0.03
# Below the range from which systems take the ports of outgoing connections: what is free here stays free.
_PORTS: Final = range(20_000, 32_000)
_PORT_TRIES_MAX: Final = 200


async def grpc_ready(address: str, _pid: int) -> None:
    """Returns when the process at the address says that it is ready; TimeoutError when it does not in time."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # of the extra `platform`

    async with asyncio.timeout(READY_SECONDS_MAX):
        await _listening(address)
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="readiness")
            while True:
                try:
                    answer = await stub.Check(request, timeout=1.0, wait_for_ready=True)
                except grpc.aio.AioRpcError:
                    answer = None
                if answer is not None and answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
                await asyncio.sleep(_POLL_SECONDS)


async def http_ready(url: str, _pid: int) -> None:
    """Returns when the gateway answers /readyz with 200; TimeoutError when it does not in time."""
    limit = aiohttp.ClientTimeout(total=1.0)
    async with asyncio.timeout(READY_SECONDS_MAX), aiohttp.ClientSession(timeout=limit) as session:
        while True:
            try:
                async with session.get(f"{url}/readyz") as answer:
                    if answer.status == 200:
                        return
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(_POLL_SECONDS)


async def file_names_pid(path: Path, pid: int) -> None:
    """Returns when the process has written its pid into the file; TimeoutError when it does not in time."""
    async with asyncio.timeout(READY_SECONDS_MAX):
        while True:
            if _read(path).strip() == str(pid):
                return
            await asyncio.sleep(_POLL_SECONDS)


def require_free(port: int) -> None:
    """StartError when somebody listens on the port."""
    if not _is_free(port):
        raise StartError(
            f"Port {port} on 127.0.0.1 is taken, and the gateway needs it. "
            f"Stop what listens there (`ss -ltnp 'sport = :{port}'` names it), or choose another: --port N, 0 for any."
        )


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now and that no outgoing connection will take."""
    found: set[int] = set()
    for port in random.SystemRandom().sample(_PORTS, _PORT_TRIES_MAX):
        if len(found) == count:
            break
        if _is_free(port):
            found.add(port)
    if len(found) < count:
        raise StartError(f"Found only {len(found)} free ports of {count} on 127.0.0.1: stop what holds so many.")
    return sorted(found)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a port whose last connections are only fading is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


async def _listening(address: str) -> None:
    """A gRPC channel that is refused waits long before it tries again, so look before."""
    host, _, port = address.rpartition(":")
    while True:
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except ConnectionRefusedError:
            await asyncio.sleep(_POLL_SECONDS)
        else:
            writer.close()
            return
