"""The channel on Redis over which state processes tell each other what they committed. Nothing is kept there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Final

from mainspring_kit import redis
from mainspring_kit.tasks import raise_if_cancelled
from redis.asyncio import Redis
from redis.exceptions import RedisError

CHANNEL: Final = "mainspring:state:publications"
# What redis-py raises when the server is away, silent or refuses.
UNREACHABLE: Final = (RedisError, OSError, TimeoutError)


class Wire:
    """Publishes and hears messages; everything that may go wrong is one of UNREACHABLE."""

    def __init__(self, url: str) -> None:
        self._client: Redis = redis.connect(url)

    async def publish(self, messages: Sequence[bytes]) -> None:
        """Sends messages in one round trip."""
        try:
            async with self._client.pipeline(transaction=False) as pipeline:
                for message in messages:
                    pipeline.publish(CHANNEL, message)
                await pipeline.execute()
        finally:
            # asyncio.wait_for, under which redis-py writes, loses a cancel that meets the write's end (Python 3.11).
            raise_if_cancelled()

    async def hear(self) -> AsyncIterator[bytes]:
        """All messages from now on, this process's own too; yields an empty one as soon as it listens."""
        async with self._client.pubsub() as channel:
            try:
                await channel.subscribe(CHANNEL)
            finally:
                raise_if_cancelled()
            async for message in channel.listen():
                raise_if_cancelled()
                if message["type"] == "subscribe":
                    yield b""
                elif message["type"] == "message":
                    yield message["data"]

    async def close(self) -> None:
        """Closes all connections."""
        await self._client.aclose()
