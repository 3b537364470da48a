"""Agents, runs and events that the tests of this folder are about."""

from __future__ import annotations

from typing import Any

import orjson
from mainspring.v1 import events_pb2, types_pb2
from mainspring_execution.core.plan import AgentPlan, read_plan
from mainspring_execution.core.record import Envelope
from mainspring_execution.models.clients import Clients
from mainspring_execution.models.conversing import Shop
from mainspring_execution.models.credentials import Credentials
from mainspring_execution.models.prices import Prices

RUN_ID = "01890a5d-ac96-774b-bcce-b302099a8057"
ENVELOPE = Envelope(RUN_ID, "talk-1", "lookup", "0af7651916cd43dd8448eb211c80319c")
SHOP = Shop(Clients(), Credentials(None, {}), Prices(), frozenset())

LOOKUP = {
    "model": {
        "provider": "scripted",
        "script": [
            {
                "text": "I will look it up.",
                "calls": [{"tool": "diagnostics.echo", "arguments": {"value": "{{input.value}}"}}],
            },
            {"text": "Done.", "result": {"answer": "{{calls[0].result.value}}"}},
        ],
    },
    "tools": ["diagnostics.echo"],
}


def agent(spec: dict[str, Any]) -> types_pb2.Agent:
    """A registered version."""
    return types_pb2.Agent(name="lookup", version="3", spec=orjson.dumps(spec))


def plan(**changes: Any) -> AgentPlan:
    """The plan of the look-up agent, with changes to its specification."""
    return read_plan(agent({**LOOKUP, **changes}))


def started(data: bytes = b'{"value":7}') -> events_pb2.RunEvent:
    """The first event of a run."""
    return ENVELOPE.event(1, agent_started=events_pb2.AgentStarted(agent_version="3", input=data, attempt=1))
