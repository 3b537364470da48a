"""Redis or Valkey through redis-py: one way to connect. Nothing that may not be lost is kept there."""

from __future__ import annotations

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

ANSWER_SECONDS_MAX = 2.0


def connect(url: str, *, connections_max: int = 16) -> Redis:
    """A client that connects when first used, gives up within seconds, and leaves retrying to its caller."""
    return Redis.from_url(
        url,
        max_connections=connections_max,
        socket_connect_timeout=ANSWER_SECONDS_MAX,
        socket_timeout=ANSWER_SECONDS_MAX,
        health_check_interval=15,
        retry=Retry(NoBackoff(), 0),
    )
