"""What of an event never leaves the platform."""

from __future__ import annotations

from collections.abc import Iterable

from mainspring.v1 import events_pb2


def public(events: Iterable[events_pb2.RunEvent]) -> list[events_pb2.RunEvent]:
    """The events as a user may see them: without the model provider's own state. Others are handed on as they are."""
    return [_without_provider_state(event) if event.agent_thinking.provider_state else event for event in events]


def _without_provider_state(event: events_pb2.RunEvent) -> events_pb2.RunEvent:
    copy = events_pb2.RunEvent()
    copy.CopyFrom(event)
    copy.agent_thinking.ClearField("provider_state")
    return copy
