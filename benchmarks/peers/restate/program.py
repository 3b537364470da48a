"""Restate's server with the service of W1's look-up on granian, called through its ingress.

Settings: one node with its defaults (24 partitions, the replicated log on one copy, RocksDB's log synced to disk),
telemetry off, errors logged; granian with uvloop and HTTP/2, one process (two were no faster on two cores). Callers
keep their connections. PostgreSQL has no part in it. It has no stream of events: a caller gets the answer only.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import uvloop

from benchmarks.peers import line
from benchmarks.peers.servers import free_port, server

READY_SECONDS_MAX = 60.0
POLL_SECONDS = 0.1
# The package of npm brings the binary of its own platform only.
SERVER = "node_modules/@restatedev/restate-server-*/bin/restate-server"


@asynccontextmanager
async def prepare(order: line.Order) -> AsyncIterator[line.Prepared]:
    """The server and the service as children of this process, everything stored in the folder given."""
    node, admin, ingress, service = (free_port() for _ in range(4))
    settings = {
        "RESTATE_BASE_DIR": order.folder,
        "RESTATE_NODE_NAME": "peer",
        "RESTATE_LISTEN_MODE": "tcp",
        "RESTATE_BIND_IP": "127.0.0.1",
        "RESTATE_BIND_PORT": str(node),
        "RESTATE_ADMIN__BIND_ADDRESS": f"127.0.0.1:{admin}",
        "RESTATE_INGRESS__BIND_ADDRESS": f"127.0.0.1:{ingress}",
        "RESTATE_DISABLE_TELEMETRY": "true",
        "RESTATE_LOG_FILTER": "error",
    }
    serve = ["--interface", "asginl", "--http", "2", "--loop", "uvloop", "--port", str(service), "--log-level", "error"]
    binary = next(_server_binaries())
    async with AsyncExitStack() as held:
        server_pid = await held.enter_async_context(server(str(binary), "--no-logo", env=settings))
        service_pid = await held.enter_async_context(
            server(sys.executable, "-m", "granian", *serve, "benchmarks.peers.restate.service:app")
        )
        connector = aiohttp.TCPConnector(limit=order.callers)
        client = await held.enter_async_context(aiohttp.ClientSession(connector=connector))
        await _register(client, f"http://127.0.0.1:{admin}/deployments", f"http://127.0.0.1:{service}")

        async def run() -> object:
            async with client.post(f"http://127.0.0.1:{ingress}/lookup/run", json=line.QUESTION) as answer:
                return await answer.json() if answer.status == 200 else await answer.text()

        yield line.Prepared({"steps": run}, {"restate server": [server_pid], "service": [service_pid]})


async def _register(client: aiohttp.ClientSession, admin_url: str, service_url: str) -> None:
    """Tells the server where the service is, as soon as both serve."""
    refusal = "nothing"
    try:
        async with asyncio.timeout(READY_SECONDS_MAX):
            while True:
                try:
                    async with client.post(admin_url, json={"uri": service_url}) as answer:
                        if answer.ok:
                            return
                        refusal = await answer.text()
                except aiohttp.ClientConnectionError as error:
                    refusal = str(error)
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError as error:
        raise TimeoutError(
            f"the service was not taken in {READY_SECONDS_MAX:g} s; the server said: {refusal}"
        ) from error


def _server_binaries() -> Iterator[Path]:
    return Path(sys.prefix).glob(SERVER)


if __name__ == "__main__":
    line.serve(prepare, ["restate-sdk", "granian"], runner=asyncio.Runner(loop_factory=uvloop.new_event_loop))
