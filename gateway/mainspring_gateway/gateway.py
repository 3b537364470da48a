"""What every request of the process shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from aiohttp import web
from mainspring_kit.errors import MainspringError, Reason
from mainspring_kit.identity import TokenVerifier

from mainspring_gateway.config import GatewaySettings
from mainspring_gateway.connections import Connections
from mainspring_gateway.door import Strangers
from mainspring_gateway.engine import Engine
from mainspring_gateway.outgoing import Flusher
from mainspring_gateway.peers import Peers


@dataclass(frozen=True, slots=True)
class Gateway:
    """The parts of a running gateway."""

    settings: GatewaySettings
    verifier: TokenVerifier
    peers: Peers
    engine: Engine
    connections: Connections
    flusher: Flusher
    strangers: Strangers

    def refuse_when_draining(self) -> None:
        """DRAINING once the process is about to stop."""
        if self.engine.draining.is_set():
            raise draining()


GATEWAY: Final = web.AppKey("gateway", Gateway)
# A request's key of its answer once that has begun: no other can be given any more.
BEGUN: Final = "mainspring_begun"


def draining() -> MainspringError:
    """What connections are told when the process is about to stop."""
    return MainspringError(
        Reason.DRAINING, "This gateway is stopping: connect again at once and follow from the last seq.", peer="gateway"
    )


def slow_consumer(limit_bytes: int) -> MainspringError:
    """What a connection is told that does not take its events."""
    return MainspringError(
        Reason.SLOW_CONSUMER,
        f"More than {limit_bytes} bytes or too many frames wait for you: connect again and follow from the last seq.",
        limit=limit_bytes,
    )
