"""W1's look-up as a graph: model -> tool -> model."""

from __future__ import annotations

import operator
from typing import Annotated, TypedDict

from langgraph.graph import END, START, StateGraph


class Conversation(TypedDict):
    """The graph's state: what was said, each with its role."""

    messages: Annotated[list[dict[str, str]], operator.add]


async def call_model(state: Conversation) -> Conversation:
    last = state["messages"][-1]
    if last["role"] == "user":
        return {"messages": [{"role": "model", "text": "I will look it up.", "tool": "echo", "value": last["value"]}]}
    return {"messages": [{"role": "model", "text": "Done.", "answer": last["value"]}]}


async def call_tool(state: Conversation) -> Conversation:
    return {"messages": [{"role": "tool", "value": state["messages"][-1]["value"]}]}


def choose(state: Conversation) -> str:
    return "tool" if "tool" in state["messages"][-1] else END


def build() -> StateGraph[Conversation]:
    """The graph, without a place for its checkpoints."""
    graph = StateGraph(Conversation)
    graph.add_node("model", call_model)
    graph.add_node("tool", call_tool)
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", choose, ["tool", END])
    graph.add_edge("tool", "model")
    return graph
