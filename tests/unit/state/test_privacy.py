"""What of an event never leaves the platform."""

from __future__ import annotations

import pytest
from mainspring.v1 import events_pb2
from mainspring_state.core.privacy import public

from tests.unit.state.samples import completed, event, thinking

pytestmark = pytest.mark.unit


def test_the_providers_own_state_is_taken_out_and_the_log_stays_as_it_is() -> None:
    private = event(2, agent_thinking=events_pb2.AgentThinking(step=1, text="Hm.", provider_state=b"secret"))
    assert public([private, completed(3)]) == [thinking(2), completed(3)]
    assert private.agent_thinking.provider_state == b"secret"
