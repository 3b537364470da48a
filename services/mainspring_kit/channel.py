"""How a process reaches another service: one balanced channel for unary calls, one channel per instance for streams."""

from __future__ import annotations

import asyncio
import socket
from datetime import UTC, datetime
from typing import Any, Final, TypedDict

import grpc
import orjson

from mainspring_kit.config import split_address
from mainspring_kit.identity import CONTEXT_KEY, ServiceTokens, UserExecutionContext

MESSAGE_BYTES_MAX: Final = 20 << 20
METADATA_BYTES_MAX: Final = 16 << 10
CALL_SECONDS_DEFAULT: Final = 5.0

_KEEPALIVE: Final[list[tuple[str, int]]] = [
    # Only a ping finds a process that stands still. Its timeout is the second one: a minute, if only the first is set.
    ("grpc.keepalive_time_ms", 1_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.ping_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_metadata_size", METADATA_BYTES_MAX),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
]

# Retries are for calls that say UNAVAILABLE before they did anything; what writes carries a request id.
_RETRY: Final = {"maxAttempts": 4, "initialBackoff": "0.05s", "maxBackoff": "0.5s", "backoffMultiplier": 2}
_SERVICE_CONFIG: Final = orjson.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": "readiness"},
        "methodConfig": [{"name": [{}], "retryPolicy": _RETRY | {"retryableStatusCodes": ["UNAVAILABLE"]}}],
        "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
    }
).decode()


class CallOptions(TypedDict):
    """Keyword arguments of every outgoing call."""

    metadata: tuple[tuple[str, str | bytes], ...]
    timeout: float | None
    wait_for_ready: bool


class Peer:
    """One service as its callers see it. `target`: `host:port[,host:port…]` or `dns:///name:port`."""

    def __init__(self, target: str, tokens: ServiceTokens) -> None:
        self._target = target
        self._tokens = tokens
        self._instances: dict[str, grpc.aio.Channel] = {}
        self.channel = grpc.aio.insecure_channel(
            _grpc_target(target),
            options=[*_KEEPALIVE, ("grpc.service_config", _SERVICE_CONFIG), ("grpc.enable_retries", 1)],
        )

    def call(
        self, context: UserExecutionContext | None = None, *, timeout_seconds: float = CALL_SECONDS_DEFAULT
    ) -> CallOptions:
        """Options of a unary call: who calls, for whom, and how long; waits for a connection within that time."""
        if context is not None and context.deadline is not None:
            timeout_seconds = min(timeout_seconds, (context.deadline - datetime.now(UTC)).total_seconds())
        return CallOptions(metadata=self._metadata(context), timeout=max(0.0, timeout_seconds), wait_for_ready=True)

    def stream(self, context: UserExecutionContext | None = None) -> CallOptions:
        """Options of a long-lived stream: no deadline; it fails at once when there is no connection."""
        return CallOptions(metadata=self._metadata(context), timeout=None, wait_for_ready=False)

    async def addresses(self) -> list[str]:
        """The instances' addresses now; empty while the name does not resolve."""
        if not self._target.startswith("dns:///"):
            return self._target.split(",")
        host, port = split_address(self._target.removeprefix("dns:///"))
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError:
            return []
        return sorted({_join(str(address[0]), port) for *_, address in found})

    def instance_channel(self, address: str) -> grpc.aio.Channel:
        """The channel of one instance, made when first asked for."""
        channel = self._instances.get(address)
        if channel is None:
            channel = self._instances[address] = grpc.aio.insecure_channel(
                address, options=[*_KEEPALIVE, ("grpc.use_local_subchannel_pool", 1)]
            )
        return channel

    async def close(self) -> None:
        """Closes all channels; calls under way are cancelled."""
        for channel in (self.channel, *self._instances.values()):
            await channel.close()

    async def __aenter__(self) -> Peer:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.close()

    def _metadata(self, context: UserExecutionContext | None) -> tuple[tuple[str, Any], ...]:
        authorization = ("authorization", self._tokens.bearer())
        if context is None:
            return (authorization,)
        return authorization, (CONTEXT_KEY, context.to_message().SerializeToString())


def _grpc_target(target: str) -> str:
    """The target in gRPC's own syntax."""
    if target.startswith("dns:///") or "," not in target:
        return target
    return "ipv4:" + target


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
