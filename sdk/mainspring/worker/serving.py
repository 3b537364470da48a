"""A worker process from start to end: a link to every dispatcher, signals, draining."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

from mainspring.errors import WorkerError
from mainspring.tool import Declaration
from mainspring.worker.calls import Calls
from mainspring.worker.link import Link, hello_of
from mainspring.worker.loading import load_tools
from mainspring.worker.logs import configure, note

CONCURRENCY_DEFAULT: Final = 100
THREADS_DEFAULT: Final = 16
DRAIN_SECONDS_DEFAULT: Final = 30.0
GOODBYE_SECONDS: Final = 2.0
RESOLVE_SECONDS: Final = 1.0  # callers know a new dispatcher as soon, and a call waits 2 s for its first worker
DIAGNOSTICS: Final = "mainspring.diagnostics"


class Worker:
    """Serves tools at every dispatcher of a target: `host:port[,host:port…]` or `dns:///name:port`."""

    def __init__(
        self,
        tools: Mapping[str, Declaration],
        *,
        target: str,
        token: str | Callable[[], str],
        concurrency: int = CONCURRENCY_DEFAULT,
        threads: int = THREADS_DEFAULT,
        drain_seconds: float = DRAIN_SECONDS_DEFAULT,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """`token` may be a function, asked at each attach. `ready` is called once, when all dispatchers have it."""
        self.worker_id = f"{socket.gethostname()[:64]}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        # Threads that still run when `run` has returned: nothing can stop them but the end of the process.
        self.threads_left = 0
        self._tools = tools
        self._target = target
        self._token = token if callable(token) else lambda: token
        self._concurrency = concurrency
        self._threads = threads
        self._drain_seconds = drain_seconds
        self._ready: Callable[[], None] | None = ready
        self._addresses: list[str] = []
        self._links: dict[str, tuple[Link, asyncio.Task[None]]] = {}

    async def run(self, stop: asyncio.Event, hurry: asyncio.Event | None = None) -> None:
        """Serves until `stop`, then finishes what is under way, within the drain time or until `hurry`.

        WorkerError when a dispatcher refuses the worker for good: its token, its role or its tools.
        """
        try:
            async with _background() as tasks:
                calls = Calls(self._tools, tasks, concurrency=self._concurrency, threads=self._threads)
                try:
                    tasks.create_task(self._keep_links(calls, tasks))
                    await stop.wait()
                    await self._drain(calls, hurry or asyncio.Event())
                finally:
                    self.threads_left = calls.close()
        except BaseExceptionGroup as group:
            refusal: BaseException | None = group.subgroup(WorkerError)
            while isinstance(refusal, BaseExceptionGroup):
                refusal = refusal.exceptions[0]
            raise refusal or group from None

    async def _keep_links(self, calls: Calls, tasks: asyncio.TaskGroup) -> None:
        """A link to each address of the target; an address that is new gets one within a second."""
        hello = hello_of(self.worker_id, self._tools, concurrency=self._concurrency)
        while True:
            self._addresses = await _resolve(self._target)
            for address in self._addresses:
                if address not in self._links:
                    link = Link(address, hello=hello, token=self._token, calls=calls)
                    self._links[address] = (link, tasks.create_task(self._keep_link(link)))
            await asyncio.sleep(RESOLVE_SECONDS)

    async def _keep_link(self, link: Link) -> None:
        await link.run(lambda: link.address in self._addresses, self._note_attached)
        del self._links[link.address]

    def _note_attached(self) -> None:
        attached = {link.address for link, _ in self._links.values() if link.is_attached}
        if self._ready is not None and attached.issuperset(self._addresses):
            self._ready()
            self._ready = None

    async def _drain(self, calls: Calls, hurry: asyncio.Event) -> None:
        note(logging.INFO, "worker_draining", calls=calls.in_flight, seconds=self._drain_seconds)
        for link, _ in self._links.values():
            link.drain()
        async with _background() as waiting:
            over = [waiting.create_task(event.wait()) for event in (calls.idle, hurry)]
            await asyncio.wait(over, timeout=self._drain_seconds, return_when=asyncio.FIRST_COMPLETED)
        if calls.in_flight:
            # They go to other workers or fail, by their effect.
            note(logging.WARNING, "calls_left", calls=calls.in_flight)
        for link, _ in self._links.values():
            link.leave()
        if tasks := [task for _, task in self._links.values()]:
            await asyncio.wait(tasks, timeout=GOODBYE_SECONDS)


def new_loop() -> asyncio.AbstractEventLoop:
    """A loop for `asyncio.Runner`: uvloop's where that is installed, which halves what a call costs."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


async def run(
    modules: Sequence[str],
    *,
    target: str,
    token: str | Callable[[], str],
    concurrency: int = CONCURRENCY_DEFAULT,
    threads: int = THREADS_DEFAULT,
    drain_seconds: float = DRAIN_SECONDS_DEFAULT,
    ready_file: Path | None = None,
) -> int:
    """A worker process: serves the tools of the modules until SIGTERM or SIGINT, and answers the exit code.

    0 when stopped as asked; 1 when a module is at fault or a dispatcher refuses, which is said on standard error. The
    first signal drains, the second does not wait for calls. `ready_file` gets the process id once every dispatcher has
    the worker. Where MAINSPRING_PARENT_FD names a pipe, its end of file stops the worker too. Tools that still run in
    threads after the drain end with the process.
    """
    configure()
    stop, hurry = asyncio.Event(), asyncio.Event()
    try:
        worker = Worker(
            _load(modules),
            target=target,
            token=token,
            concurrency=concurrency,
            threads=threads,
            drain_seconds=drain_seconds,
            ready=partial(_write_pid, ready_file),
        )
        _listen(stop, hurry)
        await worker.run(stop, hurry)
    except WorkerError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if worker.threads_left:
        # The interpreter would wait for them, and nobody can tell for how long.
        note(logging.WARNING, "threads_left", threads=worker.threads_left)
        logging.shutdown()
        os._exit(0)
    return 0


def _load(modules: Sequence[str]) -> dict[str, Declaration]:
    if DIAGNOSTICS in modules and os.environ.get("MAINSPRING_ENVIRONMENT", "production") == "production":
        raise WorkerError(
            f"{DIAGNOSTICS} serves development only: leave it out, or set MAINSPRING_ENVIRONMENT=development."
        )
    return load_tools(modules)


def _listen(stop: asyncio.Event, hurry: asyncio.Event) -> None:
    """Lets signals, and the death of the parent, end the worker."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _advance, stop, hurry)
    parent_fd = int(os.environ.get("MAINSPRING_PARENT_FD", "-1"))
    if parent_fd >= 0:
        loop.add_reader(parent_fd, _on_parent_word, parent_fd, stop)


def _write_pid(ready_file: Path | None) -> None:
    note(logging.INFO, "worker_ready")
    if ready_file is not None:
        ready_file.write_text(str(os.getpid()))


def _advance(stop: asyncio.Event, hurry: asyncio.Event) -> None:
    """The first signal stops, the second one hurries."""
    (hurry if stop.is_set() else stop).set()


def _on_parent_word(fd: int, stop: asyncio.Event) -> None:
    """The pipe to the parent became readable: at its end of file the parent is gone."""
    if not os.read(fd, 64):
        asyncio.get_running_loop().remove_reader(fd)
        note(logging.WARNING, "parent_gone")
        stop.set()


async def _resolve(target: str) -> list[str]:
    """The dispatchers' addresses now; empty while the name does not resolve."""
    if not target.startswith("dns:///"):
        return target.split(",")
    host, _, port = target.removeprefix("dns:///").rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        note(logging.WARNING, "target_unknown", target=target, detail=str(error))
        return []
    hosts = sorted({str(address[0]) for *_, address in found})
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts]


class _EndedError(Exception):
    """The block is over: ends what still runs in its group."""


@asynccontextmanager
async def _background() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose tasks are cancelled when the block ends."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
            raise _EndedError
    except* _EndedError:
        pass
