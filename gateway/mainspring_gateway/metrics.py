"""What the gateway counts for operators, beside the calls that the kit counts. No label names a tenant or a user."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge

from mainspring_gateway.connections import Connections
from mainspring_gateway.core.feeds import Feeds

SLOW_CONSUMERS: Final = Counter(
    "mainspring_gateway_slow_consumers", "Connections that were let go because they did not take their events."
)

_CONNECTIONS: Final = Gauge("mainspring_gateway_connections", "Sockets and event streams that are open.")
_FEEDS: Final = Gauge("mainspring_gateway_followed_runs", "Runs that are followed at a state process.")
_ATTACHED: Final = Gauge("mainspring_gateway_follow_attached", "Whether a state process is followed: 1 or 0.")
_GAPS: Final = Gauge("mainspring_gateway_event_gaps", "Gaps in followed runs that were healed, since the start.")
_FOREIGN: Final = Gauge("mainspring_gateway_foreign_events", "Deliveries for the wrong user that were dropped.")


def observe(connections: Connections, feeds: Feeds) -> None:
    """Has the gauges read what they show whenever they are asked."""
    _CONNECTIONS.set_function(lambda: len(connections))
    _FEEDS.set_function(lambda: len(feeds))
    _ATTACHED.set_function(lambda: feeds.is_attached)
    _GAPS.set_function(lambda: feeds.gap_count)
    _FOREIGN.set_function(lambda: feeds.foreign_count)
