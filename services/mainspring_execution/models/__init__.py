"""The Model port: who answers a model step. A provider is one module here; nothing else knows which one a run uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from mainspring_execution.core.plan import AgentPlan
from mainspring_execution.core.thought import Thought, Turn
from mainspring_execution.models.conversing import ConversingModel, Shop
from mainspring_execution.models.scripted import ScriptedModel

# Takes text of a step as it comes, a piece at a time.
Emit = Callable[[str], None]


class Model(Protocol):
    """Answers the model steps of one version of an agent; holds nothing of a run."""

    @property
    def needs_history(self) -> bool:
        """Whether a turn must bring the session's earlier runs."""
        ...

    @property
    def needs_tools(self) -> bool:
        """Whether a turn must bring the tools' descriptions."""
        ...

    @property
    def fallbacks(self) -> int:
        """How many other models there are to ask, one after the other, when the first cannot answer."""
        ...

    def rank(self, name: str) -> int:
        """Which of them has this name, `provider/name`; 0: the first one, or none of them."""
        ...

    @property
    def repairs(self) -> int:
        """How often it is told of an answer that was not right, to give another one."""
        ...

    def waits(self, step: int) -> bool:
        """Whether `think` may suspend at this step: what is known so far is then made durable first."""
        ...

    async def think(self, turn: Turn, emit: Emit) -> Thought:
        """Answers one step, giving its text to `emit` as it comes; raises MainspringError.

        Its code says whether another attempt may help.
        """
        ...


def make_model(plan: AgentPlan, shop: Shop) -> Model:
    """The model of a plan; SPEC_INVALID for a provider or a setting that this release does not have."""
    if plan.provider == "scripted":
        return ScriptedModel(plan)
    return ConversingModel(plan, shop)
