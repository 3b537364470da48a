"""What an operator can change in the dispatcher."""

from __future__ import annotations

from mainspring_kit.config import ServiceSettings
from pydantic import Field


class DispatcherSettings(ServiceSettings):
    """Settings of `python -m mainspring_dispatcher`."""

    listen: str = Field(
        "127.0.0.1:50052", pattern=r"^[^\s]+:\d{1,5}$", description="host:port to serve on; port 0: any"
    )
    registry_target: str = Field(min_length=1, description="the registry: host:port[,host:port…] or dns:///name:port")
    redis_url: str = Field("", description="Redis or Valkey, for cache, limits and breakers; not used by this release")
    waiting_calls_max: int = Field(10_000, ge=1, le=1_000_000, description="calls that may wait for a worker at once")
    workers_max: int = Field(1_000, ge=1, le=100_000, description="workers that may be attached at once")
