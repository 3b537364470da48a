"""The hub's memory: watched feeds and cached ones share one bound, whoever is given up first."""

from __future__ import annotations

import pytest
from mainspring.v1 import events_pb2
from mainspring_state.engine.hub import Hub, Key

pytestmark = pytest.mark.unit

EVENT = b"e" * 100
BYTES_MAX = 250


class Watcher:
    """Watches, and looks at nothing."""

    def deliver(self, key: Key, delivery: object, *, is_end: bool) -> None:
        """Takes it."""


def take_in(hub: Hub, key: Key) -> None:
    event = events_pb2.RunEvent(run_id=key[1], seq=1, agent_started=events_pb2.AgentStarted())
    hub.take_in(key, "ann", events=[event], encoded=[EVENT])


async def test_what_is_given_up_counts_once() -> None:
    hub = Hub(runs_max=100, bytes_max=BYTES_MAX)
    feeds = []
    for number in range(20):
        take_in(hub, ("acme", f"cached-{number}"))
        key = ("acme", f"watched-{number}")
        feeds.append(hub.watch(key, Watcher()))
        take_in(hub, key)
    assert sum(feed.tail_bytes for feed in feeds) <= BYTES_MAX
