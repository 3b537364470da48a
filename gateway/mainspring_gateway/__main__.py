"""`python -m mainspring_gateway`: wires the gateway and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from aiohttp import web
from mainspring_kit import server, telemetry
from mainspring_kit.config import SettingsError, split_address
from mainspring_kit.identity import ServiceTokens, TokenVerifier

from mainspring_gateway import metrics
from mainspring_gateway.app import make_app
from mainspring_gateway.config import GatewaySettings
from mainspring_gateway.connections import Connections
from mainspring_gateway.door import Strangers, Visitor
from mainspring_gateway.engine import Engine
from mainspring_gateway.gateway import Gateway, draining
from mainspring_gateway.outgoing import Flusher
from mainspring_gateway.peers import Peers

NAME = "gateway"

_BACKLOG = 1_024


async def main(settings: GatewaySettings, stop: asyncio.Event) -> None:
    """Serves until `stop`; then: no new connections, sockets told to come again elsewhere, requests finished."""
    verifier = TokenVerifier(settings.auth_secret.get_secret_value(), settings.service_secret.get_secret_value())
    listener = _listener(settings.listen)
    tokens = ServiceTokens(settings.service_secret.get_secret_value(), NAME)
    async with Peers(
        tokens,
        registry=settings.registry_target,
        execution=settings.execution_target,
        state=settings.state_target,
    ) as peers:
        engine = Engine(settings, peers)
        connections = Connections(settings)
        metrics.observe(connections, engine.feeds)
        gateway = Gateway(settings, verifier, peers, engine, connections, Flusher(), Strangers(settings))
        async with engine.running(connections.beat), _serving(gateway, listener):
            await stop.wait()
            engine.draining.set()
            connections.shut_all(draining())


def _listener(address: str) -> socket.socket:
    """The listening socket, bound before anything runs, so that a taken port is a matter of settings."""
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise SettingsError(f"{address} is not free: choose another MAINSPRING_LISTEN.") from error


@asynccontextmanager
async def _serving(gateway: Gateway, listener: socket.socket) -> AsyncIterator[None]:
    runner = web.AppRunner(make_app(gateway), shutdown_timeout=gateway.settings.drain_seconds)
    await runner.setup()
    assert runner.server is not None
    visitor = partial(
        Visitor,
        runner.server,
        strangers=gateway.strangers,
        keepalive_timeout=gateway.settings.idle_seconds,
        access_log=None,
    )
    listening = await asyncio.get_running_loop().create_server(visitor, sock=listener, backlog=_BACKLOG)
    telemetry.logger().info("server_started", address=gateway.settings.listen, port=listener.getsockname()[1])
    server.settle_heap()
    try:
        yield
    finally:
        listening.close()
        await runner.cleanup()


def start() -> int:
    """Runs the process: `serve`, which is also what no argument means."""
    if sys.argv[1:] not in ([], ["serve"]):
        sys.stderr.write("usage: python -m mainspring_gateway [serve]\n")
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else server.EXIT_SETTINGS
    return server.run(NAME, GatewaySettings, main=main)


if __name__ == "__main__":
    sys.exit(start())
