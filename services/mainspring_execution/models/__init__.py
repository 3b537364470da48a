"""The Model port: who answers a model step. A provider is one module here; nothing else knows which one a run uses."""

from __future__ import annotations

from typing import Protocol

from mainspring_execution.core.plan import AgentPlan, spec_invalid
from mainspring_execution.core.thought import Thought, Turn
from mainspring_execution.models.scripted import ScriptedModel


class Model(Protocol):
    """Answers the model steps of one version of an agent; holds nothing of a run."""

    @property
    def needs_history(self) -> bool:
        """Whether a turn must bring the session's earlier runs."""
        ...

    def waits(self, step: int) -> bool:
        """Whether `think` may suspend at this step: what is known so far is then made durable first."""
        ...

    async def think(self, turn: Turn) -> Thought:
        """Answers one step; raises MainspringError, UNAVAILABLE where another attempt may help."""
        ...


def make_model(plan: AgentPlan) -> Model:
    """The model of a plan; SPEC_INVALID for a provider or a setting that this release does not have."""
    if plan.provider == "scripted":
        return ScriptedModel(plan)
    raise spec_invalid("model.provider", f"{plan.provider!r} is not one of: scripted")
