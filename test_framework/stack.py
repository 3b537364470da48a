"""A running stack as tests see it: where everything is, the rows behind it, and how to kill its processes."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import mainspring.dev
import redis.asyncio
from mainspring.dev.child import Child
from mainspring.dev.witness import Silent

from test_framework.identities import Identities
from test_framework.loop_thread import LoopThread
from test_framework.rows import Rows

ROOT = Path(__file__).parents[1]
WORKER_MODULES = ("test_framework.tools",)
PROCESSES = ("registry", "dispatcher", "execution", "state", "gateway")

_LOG_TAIL_CHARACTERS = 600
_logger = logging.getLogger(__name__)

T = TypeVar("T")


class Stack:
    """All of the platform, in real processes. What stops, kills or flushes is for private stacks only."""

    def __init__(self, running: mainspring.dev.Stack, loop: LoopThread, *, private: bool) -> None:
        self._running = running
        self._loop = loop
        self._private = private
        self.identities = Identities(running.auth_secret, running.service_secret)
        self.rows = Rows(running.database_url, running.service_database_urls)

    @property
    def gateway(self) -> str:
        """The URL of the first gateway."""
        return self._running.gateway

    @property
    def gateways(self) -> Sequence[str]:
        """The URLs of all gateways."""
        return self._running.gateways

    @property
    def services(self) -> Mapping[str, Sequence[str]]:
        """The addresses of each gRPC service's replicas."""
        return {name: addresses.split(",") for name, addresses in self._running.services.items()}

    @property
    def pids(self) -> Mapping[str, list[int]]:
        """The processes that live now, by name."""
        return self._running.pids

    async def kill(self, name: str, *, index: int = 0) -> None:
        """Kills a process with SIGKILL; it is dead when this returns, and is started again soon."""
        await self._trouble(self._running.kill(name, index=index))

    async def stop(self, name: str, *, index: int = 0) -> None:
        """Stops a process and keeps it down until `start`."""
        await self._trouble(self._running.stop(name, index=index))

    async def start(self, name: str, *, index: int = 0) -> None:
        """Starts what `stop` has stopped, and waits until it serves."""
        await self._trouble(self._running.start(name, index=index))

    async def restart(self, name: str, *, index: int = 0) -> None:
        """Stops a process as an operator would, starts it again and waits until it serves."""
        await self._trouble(self._running.restart(name, index=index))

    @asynccontextmanager
    async def frozen(self, name: str, *, index: int = 0) -> AsyncIterator[None]:
        """A process that is stopped with SIGSTOP while the block runs: it holds all it has, and does nothing."""
        await self._trouble(self._running.kill(name, index=index, signal=signal.SIGSTOP))
        try:
            yield
        finally:
            await self._trouble(self._running.kill(name, index=index, signal=signal.SIGCONT))

    async def wait_ready(self) -> None:
        """Returns when every process serves."""
        await self._there(self._running.wait_ready())

    async def flush_redis(self) -> None:
        """Empties Redis."""
        assert self._private, "the shared stack's Redis is not this test's own"
        client = redis.asyncio.Redis.from_url(self._running.redis_url)
        try:
            await client.flushall()
            assert await client.dbsize() == 0
        finally:
            await client.aclose()

    async def redis_keys(self, text: str) -> list[str]:
        """The keys in Redis whose name holds a text."""
        client = redis.asyncio.Redis.from_url(self._running.redis_url)
        try:
            return [key.decode() async for key in client.scan_iter(match=f"*{text}*", count=1_000)]
        finally:
            await client.aclose()

    def cpu_seconds(self, *names: str) -> float:
        """What processes have used so far, by Linux's own count."""
        ticks = 0
        for pid in (pid for name in names for pid in self.pids[name]):
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def log_text(self, name: str, index: int = 0) -> str:
        """What a process has logged so far."""
        return self._running.log(name, index).read_text(encoding="utf-8", errors="replace")

    async def _trouble(self, coroutine: Coroutine[Any, Any, None]) -> None:
        if not self._private:
            coroutine.close()
            raise AssertionError("a test that stops or kills a process needs a private stack")
        await self._there(coroutine)

    async def _there(self, coroutine: Coroutine[Any, Any, T]) -> T:  # Any: a coroutine's own affair
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop.loop))


class _Deaths(Silent):
    """Logs each process that died, so that a failing test shows it, whether it was killed or fell over by itself."""

    def ended(self, child: Child, *, returncode: int, restart_seconds: float) -> None:
        log = child.launch.log.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL_CHARACTERS:]
        _logger.warning(
            "%s ended with %s and starts again in %s s; its log ends with:\n%s",
            child.launch.label,
            returncode,
            restart_seconds,
            log,
        )


@contextmanager
def running_stack(
    *,
    private: bool,
    database_url: str = "",
    redis_url: str = "",
    replicas: Mapping[str, int] | None = None,
    extra_env: Mapping[str, str] | None = None,
) -> Iterator[Stack]:
    """A stack that serves while the block runs; without URLs it brings its own PostgreSQL and Valkey."""
    loop = LoopThread("stack")

    def make() -> AbstractAsyncContextManager[mainspring.dev.Stack]:
        return mainspring.dev.stack(
            workers=WORKER_MODULES,
            database_url=database_url,
            redis_url=redis_url,
            replicas=replicas,
            witness=_Deaths(),
            # The worker finds the tests' tools as pytest does.
            extra_env={"PYTHONPATH": _python_path(), **(extra_env or {})},
        )

    try:
        with loop.opened(make) as running:
            yield Stack(running, loop, private=private)
    finally:
        loop.close()


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
