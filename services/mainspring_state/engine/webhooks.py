"""Tells those outside who asked for it of runs' ends: each at least once, again and again until it is taken."""

from __future__ import annotations

import asyncio
import random
import socket
from datetime import UTC, datetime, timedelta
from typing import Final

import aiohttp
from aiohttp.connector import AddrInfoType
from mainspring_kit import telemetry
from mainspring_kit.errors import MainspringError

from mainspring_state.core.told import GONE, is_private, next_pause_seconds, write_message
from mainspring_state.store.webhooks import DueWebhook, Webhooks

LOOK_SECONDS: Final = 1.0
POST_SECONDS: Final = 10.0
# A process that dies while it tells leaves the rest to another one after this long.
HOLD_SECONDS: Final = 60.0
AT_ONCE_MAX: Final = 32


class Teller:
    """Posts what is due, as long as `run` is awaited. `secret`: what tenants' keys are derived from."""

    def __init__(self, webhooks: Webhooks, *, secret: str, allows_private: bool) -> None:
        self._webhooks = webhooks
        self._secret = secret
        self._allows_private = allows_private

    async def run(self) -> None:
        """Looks for what is due."""
        guard = None if self._allows_private else public_socket
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(socket_factory=guard, limit=AT_ONCE_MAX),
            timeout=aiohttp.ClientTimeout(total=POST_SECONDS),
        ) as session:
            while True:
                due: list[DueWebhook] = []
                try:
                    due = await self._webhooks.due(item_max=AT_ONCE_MAX, hold_seconds=HOLD_SECONDS)
                    async with asyncio.TaskGroup() as tasks:
                        for webhook in due:
                            tasks.create_task(self._tell(session, webhook))
                except MainspringError as error:
                    telemetry.logger().debug("webhooks_delayed", detail=str(error)[:200])
                if len(due) < AT_ONCE_MAX:
                    await asyncio.sleep(LOOK_SECONDS)

    async def _tell(self, session: aiohttp.ClientSession, webhook: DueWebhook) -> None:
        fault, is_gone = await self._post(session, webhook)
        seconds = None if is_gone else next_pause_seconds(webhook.attempts, chance=random.random())
        next_due = None if seconds is None else datetime.now(UTC) + timedelta(seconds=seconds)
        log = telemetry.logger().info if not fault else telemetry.logger().warning
        log("webhook_told", run_id=webhook.run.run_id, attempts=webhook.attempts, fault=fault, is_over=next_due is None)
        try:
            await self._webhooks.settle(webhook.run, is_done=not fault, next_due=next_due, error=fault)
        except MainspringError as error:
            # It is told once more when the hold is over.
            telemetry.logger().debug("webhook_unsettled", detail=str(error)[:200])

    async def _post(self, session: aiohttp.ClientSession, webhook: DueWebhook) -> tuple[str, bool]:
        """Why it was not taken, empty: it was; and whether nobody is there any more."""
        message = write_message(webhook.run, secret=self._secret, now=datetime.now(UTC))
        try:
            async with session.post(
                webhook.url, data=message.body, headers=message.headers, allow_redirects=False
            ) as response:
                if 200 <= response.status < 300:
                    return "", False
                return f"answered {response.status}", response.status == GONE
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            return f"{type(error).__name__}: {error}"[:500], False


def public_socket(address: AddrInfoType) -> socket.socket:
    """A socket to a public address only: neither a name nor a number may lead into our own network."""
    family, kind, protocol, _, target = address
    if is_private(str(target[0])):
        raise OSError(None, f"{target[0]} is not a public address")
    return socket.socket(family, kind, protocol)
