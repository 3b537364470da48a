"""W1's look-up as a DBOS workflow: two model steps and a tool step; `stream` also writes five events for a live reader.

Settings: asynchronous workflows on uvloop (compared once with threads, runs a second at 1 and 64 callers: 11.7 and 32.9
against 17.7 and 25.3 with the stream, 62 and 72 against 87 and 76 with steps alone); LISTEN/NOTIFY on, notifications
coalesced for 10 ms, a pool of 20 connections, half of them for readers, which all are the defaults (shorter coalescing
and larger pools, tried once, changed nothing that could be seen); warnings logged only.
Callers and workflows share a process, as in an application that embeds DBOS. The workflow closes its stream, so that no
reader polls for its end.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvloop
from dbos import DBOS

from benchmarks.peers import line

STREAM = "events"
EVENTS = ["agent_started", "agent_thinking", "tool_executing", "tool_completed", "agent_completed"]


@DBOS.step()
async def call_model(result: str | None) -> dict[str, str]:
    if result is None:
        return {"text": "I will look it up.", "tool": "echo"}
    return {"text": "Done.", "answer": result}


@DBOS.step()
async def call_tool(value: str) -> str:
    return value


@DBOS.workflow()
async def look_up(value: str) -> str:
    await call_model(None)
    result = await call_tool(value)
    done = await call_model(result)
    return done["answer"]


@DBOS.workflow()
async def look_up_aloud(value: str) -> str:
    await _write("agent_started", input=value)
    asked = await call_model(None)
    await _write("agent_thinking", text=asked["text"])
    await _write("tool_executing", tool=asked["tool"])
    result = await call_tool(value)
    await _write("tool_completed", result=result)
    done = await call_model(result)
    await _write("agent_completed", text=done["text"], answer=done["answer"])
    await DBOS.close_stream_async(STREAM)
    return done["answer"]


async def _write(event: str, **fields: str) -> None:
    await DBOS.write_stream_async(STREAM, {"type": event, **fields})


async def run_steps() -> str:
    """A run without events, from its start to its result."""
    workflow = await DBOS.start_workflow_async(look_up, line.QUESTION)
    return await workflow.get_result()


async def run_stream() -> str:
    """A run whose events are read as they come, until the last."""
    workflow = await DBOS.start_workflow_async(look_up_aloud, line.QUESTION)
    events = [event async for event in DBOS.read_stream_async(workflow.workflow_id, STREAM)]
    if [event["type"] for event in events] != EVENTS:
        raise ValueError(f"the stream held {events}")
    answer: str = events[-1]["answer"]
    return answer


@asynccontextmanager
async def prepare(order: line.Order) -> AsyncIterator[line.Prepared]:
    """DBOS in this process, its tables in the database given."""
    DBOS(
        config={
            "name": "lookup",
            "system_database_url": order.database_url,
            "log_level": "WARNING",
        }
    )
    DBOS.launch()
    try:
        yield line.Prepared({"stream": run_stream, "steps": run_steps}, {"dbos": [os.getpid()]})
    finally:
        DBOS.destroy()


if __name__ == "__main__":
    line.serve(prepare, ["dbos"], runner=asyncio.Runner(loop_factory=uvloop.new_event_loop))
