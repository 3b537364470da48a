"""What the registry does when nobody calls: looks for new revisions of the catalog and keeps its watchers going."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from mainspring.v1 import registry_pb2
from mainspring_kit import postgres, telemetry
from mainspring_kit.errors import MainspringError, Reason

from mainspring_registry.core import catalog
from mainspring_registry.store import Store, open_revisions

# Watchers are promised a beat each 250 ms; the rest is for the look itself.
TICK_SECONDS: Final = 0.2
RECONNECT_SECONDS: Final = 0.2


class CatalogWatch:
    """The newest revision as PostgreSQL last told it, and the streams that wait for the next time it does.

    Each look at PostgreSQL is one tick, each tick moves every stream: by a change or by a beat. While PostgreSQL cannot
    be reached there are no ticks, so no beats, and watchers know that their copies may be stale.
    """

    def __init__(self, store: Store, database_url: str, *, watchers_max: int) -> None:
        self._store = store
        self._database_url = database_url
        self._watchers_max = watchers_max
        self._watchers = 0
        self._revision = 0
        self._tick = asyncio.Event()
        self._draining = False
        self._connected = False

    def is_connected(self) -> bool:
        """Whether the last look at PostgreSQL succeeded."""
        return self._connected

    async def run(self) -> None:
        """Looks for changes until it is cancelled."""
        while True:
            try:
                await self._look()
            except postgres.UNREACHABLE as error:
                if self._connected:
                    telemetry.logger().warning("catalog_unreachable", error=repr(error))
                self._connected = False
            await asyncio.sleep(RECONNECT_SECONDS)

    def drain(self) -> None:
        """Ends all streams; watchers go to another process."""
        self._draining = True
        self._move()

    async def frames(self, after_revision: int) -> AsyncIterator[registry_pb2.WatchCatalogResponse]:
        """Every change after a revision, each as soon as it is known, and a beat at each tick without one.

        Frames of a first copy have revision 0 until it is complete. QUEUE_FULL, DRAINING, PEER_UNAVAILABLE.
        """
        if self._watchers >= self._watchers_max:
            raise MainspringError(
                Reason.QUEUE_FULL,
                f"{self._watchers_max} watchers are served here already: try another registry process.",
                queue="watchers",
                limit=self._watchers_max,
            )
        self._watchers += 1
        try:
            newest = await self._store.read_revision()
            seen = catalog.begin_watch(after_revision, newest)
            while not self._draining:
                # Taken before the reads: a tick that comes during them is not missed.
                tick = self._tick
                newest = max(newest, self._revision)
                is_first_copy = seen == 0
                while seen < newest and (frame := await self._store.read_changes(seen)):
                    seen = frame.revision
                    if is_first_copy:
                        frame.revision = 0
                    yield frame
                # Revisions of which nothing is left, or that were never used, are seen too.
                seen = max(seen, newest)
                yield registry_pb2.WatchCatalogResponse(revision=seen)
                await tick.wait()
        finally:
            self._watchers -= 1
        raise MainspringError(Reason.DRAINING, "The registry process stops: watch at another one.", peer="registry")

    async def _look(self) -> None:
        async with open_revisions(self._database_url) as revisions:
            while True:
                self._revision = await revisions.read()
                self._connected = True
                self._move()
                await revisions.wait(TICK_SECONDS)

    def _move(self) -> None:
        """Wakes every stream, once."""
        self._tick.set()
        self._tick = asyncio.Event()
