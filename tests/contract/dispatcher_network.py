"""A network that can be cut between a worker and its dispatcher, and dispatchers that can be stopped and started."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from mainspring.v1 import dispatcher_pb2 as pb
from mainspring.v1 import dispatcher_pb2_grpc as rpc
from mainspring_dispatcher.__main__ import wired
from mainspring_dispatcher.config import DispatcherSettings
from mainspring_kit.server import Service, serving

from test_framework.waiting import wait_until

CHUNK_BYTES = 65_536


class Network:
    """Forwards TCP connections to an address, until it is cut."""

    def __init__(self, target: str) -> None:
        self.address = ""
        self.connections = 0
        self._host, _, self._port = target.rpartition(":")
        self._whole = True
        self._writers: set[asyncio.StreamWriter] = set()

    def cut(self) -> None:
        """Breaks every connection and refuses new ones."""
        self._whole = False
        for writer in self._writers:
            writer.transport.abort()

    def mend(self) -> None:
        """Lets new connections through."""
        self._whole = True

    @asynccontextmanager
    async def laid(self) -> AsyncIterator[Network]:
        """Listens while the block runs."""
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            self.cut()
            await wait_until(lambda: not self._writers, what="all connections are closed")

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._whole:
            writer.transport.abort()
            return
        self.connections += 1
        there, back = await asyncio.open_connection(self._host, int(self._port))
        self._writers |= {writer, back}
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._pump(reader, back))
            tasks.create_task(self._pump(there, writer))
        self._writers -= {writer, back}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while chunk := await reader.read(CHUNK_BYTES):
                writer.write(chunk)
                await writer.drain()
        except ConnectionError:
            pass
        writer.transport.abort()


class Dispatcher:
    """A dispatcher on the test's own loop, which can be stopped and started again at the same address."""

    def __init__(self, environment: dict[str, Any], address: str) -> None:  # Any: what settings take
        self.address = address
        self._settings = DispatcherSettings(**{**environment, "listen": address, "drain_seconds": 3})
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        """Serves from now on."""
        servicer, board = await self._stack.enter_async_context(wired(self._settings))
        descriptor = pb.DESCRIPTOR.services_by_name["DispatcherService"]
        service = Service(descriptor, rpc.add_DispatcherServiceServicer_to_server, servicer)
        await self._stack.enter_async_context(
            serving(self._settings, [service], ready=lambda: board.catalogue_complete)
        )
        self._stack.push_async_callback(servicer.drain, self._settings.drain_seconds)

    async def stop(self) -> None:
        """Drains and stops, as the process does."""
        await self._stack.aclose()
