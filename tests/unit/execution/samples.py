"""Agents, runs and events that the tests of this folder are about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
from mainspring.v1 import events_pb2, types_pb2
from mainspring_execution.core.decision import Decision, decide
from mainspring_execution.core.plan import AgentPlan, read_plan
from mainspring_execution.core.progress import fold
from mainspring_execution.core.record import Envelope, make_call_id
from mainspring_execution.models.clients import Clients
from mainspring_execution.models.conversing import Shop
from mainspring_execution.models.credentials import Credentials
from mainspring_execution.models.prices import Prices

PURE = types_pb2.EFFECT_CLASS_PURE
NOW = 1_800_000_000.0
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


class Log:
    """A log under construction, as a driver writes it."""

    def __init__(self) -> None:
        self.events = [started()]

    def add(self, **payload: Any) -> Log:
        """The next event."""
        self.events.append(ENVELOPE.event(len(self.events) + 1, **payload))
        return self

    def think(
        self, step: int, *, calls: int = 0, wants: Sequence[tuple[str, dict[str, Any]]] = (), result: bytes = b""
    ) -> Log:
        """A model step that plans calls of a pure tool, and those that it `wants`: tools with arguments."""
        seq = len(self.events) + 1
        asked = [*([("diagnostics.echo", {})] * calls), *wants]
        planned = [
            events_pb2.PlannedCall(
                call_id=make_call_id(RUN_ID, seq, index=index), tool=tool, arguments=orjson.dumps(arguments)
            )
            for index, (tool, arguments) in enumerate(asked)
        ]
        usage = types_pb2.Usage(input_tokens=2, output_tokens=3)
        return self.add(
            agent_thinking=events_pb2.AgentThinking(step=step, planned_calls=planned, result=result, usage=usage)
        )

    def intend(self, effect: types_pb2.EffectClass.ValueType = PURE) -> Log:
        """The intent of the next call."""
        call = next(call for call in fold(self.events).open_calls() if call.call_id not in fold(self.events).intents)
        return self.add(
            tool_executing=events_pb2.ToolExecuting(call_id=call.call_id, tool=call.tool, effect=effect, attempt=1)
        )

    def complete(self) -> Log:
        """The outcome of the first call that has none."""
        call_id = fold(self.events).lost_calls()[0]
        return self.add(tool_completed=events_pb2.ToolCompleted(call_id=call_id, status=types_pb2.TOOL_STATUS_OK))

    def recover(self) -> Log:
        """A takeover."""
        lost = fold(self.events).lost_calls()
        return self.add(run_recovered=events_pb2.RunRecovered(attempt=1, executor="e2", lost_calls=lost))

    def decision(self, **limits: Any) -> Decision:
        """What core decides at the moment NOW."""
        return self.decision_at(NOW, **limits)

    def decision_at(self, now: float, **limits: Any) -> Decision:
        """The same at another moment."""
        return decide(plan(limits=limits), fold(self.events), run_id=RUN_ID, now=now)
