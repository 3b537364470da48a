"""W1's look-up as a graph, model -> tool -> model, with the PostgreSQL saver and `durability="sync"`.

Settings: `AsyncPostgresSaver` on a pool of 8 connections with autocommit and prepared statements as its page asks for,
uvloop, orjson (it comes along), tracing off. Each run is a thread of its own. The saver takes one statement at a time
whatever the pool's size; several savers on the pool were no faster, for Python's own work is what limits it. Callers
and graph share a process, as in an application that embeds LangGraph. It stores no events: nothing follows a run.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvloop
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

from benchmarks.peers import line
from benchmarks.peers.langgraph.graph import build

POOL_SIZE = 8


@asynccontextmanager
async def prepare(order: line.Order) -> AsyncIterator[line.Prepared]:
    """The graph in this process, its checkpoints in the database given."""
    async with AsyncConnectionPool(
        order.database_url,
        min_size=POOL_SIZE,
        max_size=POOL_SIZE,
        open=False,
        kwargs={"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row},
    ) as pool:
        saver = AsyncPostgresSaver(pool)
        await saver.setup()
        compiled = build().compile(checkpointer=saver)

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
