"""What an operator can change at the gateway."""

from __future__ import annotations

from urllib.parse import urlsplit

from mainspring_kit.config import ServiceSettings
from pydantic import Field, field_validator

_TARGET = r"^(dns:///)?[^\s,]+:\d{1,5}(,[^\s,]+:\d{1,5})*$"


class GatewaySettings(ServiceSettings):
    """The gateway's settings. A target is `host:port[,host:port…]` or `dns:///name:port`."""

    listen: str = Field("127.0.0.1:8080", pattern=r"^[^\s]+:\d{1,5}$", description="host:port of HTTP; port 0: any")
    registry_target: str = Field("127.0.0.1:50051", pattern=_TARGET, description="where the registry is")
    dispatcher_target: str = Field("127.0.0.1:50052", pattern=_TARGET, description="told to workers that ask")
    execution_target: str = Field("127.0.0.1:50053", pattern=_TARGET, description="where execution is")
    state_target: str = Field("127.0.0.1:50054", pattern=_TARGET, description="where state is")

    allowed_origins: str = Field(
        "", description="origins of pages that may open sockets, separated by commas, beside the gateway's own; *: any"
    )
    heartbeat_seconds: float = Field(25, gt=0, le=3_600, description="silence of a client after which it is pinged")
    hello_seconds: float = Field(5, gt=0, le=60, description="time for a first frame that carries the credential")
    sse_heartbeat_seconds: float = Field(15, gt=0, le=300, description="silence on an event stream before a comment")
    start_seconds: float = Field(10, gt=0, le=300, description="time for a started run to become durable")
    idle_seconds: float = Field(75, gt=0, le=3_600, description="time for a request's head, and between requests")
    close_seconds: float = Field(5, gt=0, le=60, description="time for a client to answer a close")

    frame_bytes_max: int = Field(1 << 20, ge=1_024, le=16 << 20, description="size of a client's frame or body")
    queue_bytes_max: int = Field(4 << 20, ge=65_536, description="bytes that may wait for one slow client")
    queue_frames_max: int = Field(20_000, ge=100, description="frames that may wait for one slow client")
    followed_runs_max: int = Field(1_000, ge=1, description="runs that one socket may follow at a time")
    commands_max: int = Field(64, ge=1, description="commands of one socket that may be under way at a time")
    sockets_per_user_max: int = Field(1_024, ge=1, description="sockets and event streams that one user may have open")
    sockets_max: int = Field(20_000, ge=1, description="sockets and event streams that this process takes")
    strangers_max: int = Field(5_000, ge=1, description="connections that have named no user yet, in all")
    strangers_per_peer_max: int = Field(
        1_000, ge=1, description="those of one address; behind a proxy all clients have one: set it to strangers_max"
    )
    reads_max: int = Field(32, ge=1, le=1_000, description="log reads for replays that may be under way at a time")

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, value: str) -> str:
        for origin in filter(None, (part.strip() for part in value.split(","))):
            parts = urlsplit(origin)
            if origin != "*" and f"{parts.scheme}://{parts.netloc}" != origin:
                raise ValueError(f"{origin!r} is no origin: write scheme://host[:port], or *")
        return value

    @property
    def origins(self) -> frozenset[str]:
        """The allowed origins, each as browsers send it."""
        return frozenset(filter(None, (part.strip().lower() for part in self.allowed_origins.split(","))))
