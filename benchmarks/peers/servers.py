"""Servers that a peer's program starts as its children. As `line` it imports the standard library only."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager


@asynccontextmanager
async def server(*argv: str, env: Mapping[str, str] | None = None) -> AsyncIterator[int]:
    """The pid of a child, which is killed at the end: nothing it keeps is needed again. `child` ends what it leaves."""
    process = await asyncio.create_subprocess_exec(
        *argv, env={**os.environ, **(env or {})}, stdin=asyncio.subprocess.DEVNULL, stdout=2
    )
    try:
        yield process.pid
    finally:
        process.kill()
        await process.wait()


def free_port() -> int:
    """A port of the loopback that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
