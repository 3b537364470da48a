"""W1's look-up on an Aegra server: `POST /runs/stream`, the graph's updates read as they come, until the end.

Settings: one uvicorn process with uvloop, the Redis broker and its workers on (2 x 32 runs at a time instead of 3 x 10,
for 64 callers), checkpoints with durability sync, threads kept, logging of errors only, no crons, no authentication.
Callers keep their connections. Its queue and events are in a database of their own of the Valkey server that the
platform uses.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from benchmarks.peers import line
from benchmarks.peers.servers import free_port, server

READY_SECONDS_MAX = 80.0
POLL_SECONDS = 0.1
ASKED = {
    "assistant_id": "lookup",
    "input": {"messages": [{"role": "user", "value": line.QUESTION}]},
    "stream_mode": ["updates"],
    "durability": "sync",
    "on_completion": "keep",
}
NODES = ["model", "tool", "model"]


@asynccontextmanager
async def prepare(order: line.Order) -> AsyncIterator[line.Prepared]:
    """The server as a child of this process, its tables in the database given."""
    config = _write_config(Path(order.folder, "aegra.json"))
    settings = {
        "AEGRA_CONFIG": str(config),
        "AEGRA_CHECKPOINT_DURABILITY": "sync",
        "DATABASE_URL": order.database_url,
        "SQLALCHEMY_POOL_SIZE": "10",
        "SQLALCHEMY_MAX_OVERFLOW": "6",
        "LANGGRAPH_MAX_POOL_SIZE": "16",
        "REDIS_BROKER_ENABLED": "true",
        "REDIS_URL": order.redis_url,
        "WORKER_COUNT": "2",
        "N_JOBS_PER_WORKER": str(max(1, order.callers // 2)),
        "CRON_ENABLED": "false",
        "ENV_MODE": "PRODUCTION",
        "LOG_LEVEL": "ERROR",
    }
    port = free_port()
    serve = ["aegra_api.main:app", "--port", str(port), "--loop", "uvloop", "--log-level", "error", "--no-access-log"]
    url = f"http://127.0.0.1:{port}"
    async with AsyncExitStack() as held:
        pid = await held.enter_async_context(server(sys.executable, "-m", "uvicorn", *serve, env=settings))
        connector = aiohttp.TCPConnector(limit=order.callers)
        client = await held.enter_async_context(aiohttp.ClientSession(url, connector=connector))
        await _wait_ready(client)

        async def run() -> object:
            async with client.post("/runs/stream", json=ASKED) as answer:
                if not answer.ok:
                    return await answer.text()
                return _answer_of([update async for update in _updates(answer.content)])

        yield line.Prepared({"graph": run}, {"aegra": [pid]})


def _write_config(path: Path) -> Path:
    path.write_text(json.dumps({"graphs": {"lookup": f"{Path(__file__).with_name('graph.py')}:graph"}}))
    return path


async def _wait_ready(client: aiohttp.ClientSession) -> None:
    async with asyncio.timeout(READY_SECONDS_MAX):
        while True:
            try:
                async with client.get("/ready") as answer:
                    if answer.ok:
                        return
            except aiohttp.ClientConnectionError:
                pass  # it does not listen yet
            await asyncio.sleep(POLL_SECONDS)


async def _updates(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """What each node said, from the server-sent events. Any: JSON."""
    event = ""
    async for raw in content:
        name, _, value = raw.decode().rstrip("\r\n").partition(": ")
        if name == "event":
            event = value
        elif name == "data" and event in ("updates", "error"):
            yield json.loads(value)


def _answer_of(updates: list[dict[str, Any]]) -> object:
    """The answer, or all that came when it is not what it should be. Any: JSON."""
    if [node for update in updates for node in update] != NODES:
        return updates
    return updates[-1]["model"]["messages"][-1]["answer"]


if __name__ == "__main__":
    line.serve(prepare, ["aegra-api", "langgraph"], runner=asyncio.Runner(loop_factory=uvloop.new_event_loop))
