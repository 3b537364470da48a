"""W1's look-up as a graph, model -> tool -> model, with the PostgreSQL saver and `durability="sync"`.

Settings: `AsyncPostgresSaver` on a pool of 16 connections with autocommit and prepared statements as its page asks for,
uvloop, orjson (it comes along), tracing off. Each run is a thread of its own. The saver takes one statement at a time
whatever the pool's size; several savers on the pool were no faster, for Python's own work is what limits it. Callers
and graph share a process, as in an application that embeds LangGraph. It stores no events: nothing follows a run.
"""

from __future__ import annotations

import asyncio
import operator
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, TypedDict

import uvloop
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.graph import END, START, StateGraph
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

from benchmarks.peers import line

POOL_SIZE = 16


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


@asynccontextmanager
async def prepare(order: line.Order) -> AsyncIterator[line.Prepared]:
    """The graph in this process, its checkpoints in the database given."""
    graph = StateGraph(Conversation)
    graph.add_node("model", call_model)
    graph.add_node("tool", call_tool)
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", choose, ["tool", END])
    graph.add_edge("tool", "model")
    async with AsyncConnectionPool(
        order.database_url,
        min_size=POOL_SIZE,
        max_size=POOL_SIZE,
        open=False,
        kwargs={"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row},
    ) as pool:
        saver = AsyncPostgresSaver(pool)
        await saver.setup()
        compiled = graph.compile(checkpointer=saver)

        async def run() -> object:
            final = await compiled.ainvoke(
                {"messages": [{"role": "user", "value": line.QUESTION}]},
                {"configurable": {"thread_id": str(uuid.uuid4())}},
                durability="sync",
            )
            return final["messages"][-1]["answer"]

        yield line.Prepared({"graph": run}, {"langgraph": [os.getpid()]})


if __name__ == "__main__":
    line.serve(
        prepare,
        ["langgraph", "langgraph-checkpoint-postgres"],
        runner=asyncio.Runner(loop_factory=uvloop.new_event_loop),
    )
