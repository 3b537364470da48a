"""Whether this process and others are there: the database's clock, the living state processes, the log's partitions."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Final

import asyncpg
from mainspring_kit import telemetry
from mainspring_kit.errors import MainspringError

from mainspring_state.store.leases import Leases

MEET_SECONDS: Final = 1.0
PARTITION_SECONDS: Final = 3_600.0
WEEKS_AHEAD: Final = 4


class Presence:
    """Says once a second that this process lives, and learns who else does and what time it is there."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._offset_seconds = 0.0
        self.peers: list[str] = []
        self.connected: datetime | None = None

    def now(self) -> float:
        """The database's time, in seconds since 1970, as well as it is known here."""
        return time.time() + self._offset_seconds

    async def run(self) -> None:
        """Goes on as long as it is awaited."""
        partitions_due = 0.0
        while True:
            try:
                await self._meet()
                if time.monotonic() >= partitions_due:
                    await self._make_partitions()
                    partitions_due = time.monotonic() + PARTITION_SECONDS
            except MainspringError as error:
                if self.connected is not None:
                    telemetry.logger().warning("database_unreachable", detail=str(error)[:200])
                self.connected = None
            await asyncio.sleep(MEET_SECONDS)

    async def leave(self) -> None:
        """Says that this process has left; whatever hinders it is no reason to stay."""
        try:
            await self._leases.leave_processes()
        except MainspringError as error:
            telemetry.logger().warning("database_unreachable", detail=str(error)[:200])

    async def _meet(self) -> None:
        start = time.time()
        peers, moment = await self._leases.meet_processes()
        self._offset_seconds = moment.timestamp() - (start + time.time()) / 2
        if self.connected is None:
            # From here on beats can be stored: nobody's silence counts from before.
            self.connected = moment.astimezone(UTC)
        if sorted(peers) != sorted(self.peers):
            telemetry.logger().info("peers_changed", count=len(peers))
            self.peers = peers

    async def _make_partitions(self) -> None:
        try:
            made = await self._leases.make_partitions(weeks_ahead=WEEKS_AHEAD)
        except asyncpg.LockNotAvailableError:
            # Somebody reads the default partition for long; there are weeks of time.
            telemetry.logger().warning("partitions_delayed")
            return
        if made:
            telemetry.logger().info("partitions_made", count=made)
