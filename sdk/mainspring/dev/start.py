"""How a local stack starts, step by step, and how it ends whatever happens: with nothing left running."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final

import psutil

from mainspring.dev import plan as plans
from mainspring.dev.child import tail
from mainspring.dev.folder import Folder
from mainspring.dev.guard import guarding
from mainspring.dev.logs import trim
from mainspring.dev.plan import Plan
from mainspring.dev.probe import require_free
from mainspring.dev.running import Stack
from mainspring.dev.witness import Silent, Witness
from mainspring.embedded import postgres, valkey
from mainspring.embedded.launch import StartError

LEFTOVER_SECONDS_MAX: Final = 8.0

_MIGRATION_SECONDS_MAX: Final = 120.0


@asynccontextmanager
async def stack(
    *,
    data_dir: Path | None = None,
    port: int = 0,
    replicas: Mapping[str, int] | None = None,
    workers: Sequence[str] | None = (),
    extra_env: Mapping[str, str] | None = None,
    log_level: str = "info",
    database_url: str = "",
    redis_url: str = "",
    ready_file: Path | None = None,
    witness: Witness | None = None,
) -> AsyncIterator[Stack]:
    """A stack that serves while the block runs.

    Without a data folder it has one of its own, gone at the end. `workers` are modules with tools, beside the
    diagnostic ones that are always there; None: no worker. `log_level` is the least that processes write to their log
    files; `extra_env` goes to every process but the two servers. Without URLs it brings its own PostgreSQL and Valkey.
    StartError says why it can't start.
    """
    async with AsyncExitStack() as held:
        folder = Folder(data_dir or Path(held.enter_context(_temporary())))
        addresses = plans.choose_addresses(port, replicas or {})
        held.enter_context(folder.lock(f"http://{addresses['gateway'][0]}"))
        await asyncio.to_thread(_end_leftovers, folder)
        if port:
            require_free(port)
        sockets = folder.sockets()
        plan = Plan(
            secrets=folder.secrets(),
            database_url=database_url or postgres.url(sockets),
            redis_url=redis_url or valkey.url(sockets / "valkey.sock"),
            addresses=addresses,
            workers=None if workers is None else tuple(workers),
            worker_replicas=(replicas or {}).get(plans.WORKER, 1),
            extra_env={"MAINSPRING_LOG_LEVEL": log_level, **(extra_env or {})},
        )
        ready_files = [folder.ready_file, *([ready_file] if ready_file else [])]
        for path in ready_files:
            path.unlink(missing_ok=True)  # of one that was killed: whoever waits for it must not believe it
        guard = await held.enter_async_context(guarding())
        running = Stack(plan, folder, guard=guard, ready_files=ready_files, witness=witness or Silent())
        start = _Start(running, witness or Silent(), parent_fd=held.enter_context(parent_pipe()))
        try:
            async with asyncio.TaskGroup() as tasks:
                trimming = tasks.create_task(trim(folder.logs))
                try:
                    await start.servers(tasks, embed_postgres=not database_url, embed_redis=not redis_url)
                    await start.migrate()
                    await start.processes(tasks)
                    running.complete()
                    yield running
                finally:
                    await running.shut_down()
                    trimming.cancel()
        except BaseExceptionGroup as group:
            raise _innermost(group) from None


class _Start:
    """The steps of a start, each told to the witness."""

    def __init__(self, running: Stack, witness: Witness, *, parent_fd: int) -> None:
        self._running = running
        self._witness = witness
        self._parent_fd = parent_fd

    async def servers(self, tasks: asyncio.TaskGroup, *, embed_postgres: bool, embed_redis: bool) -> None:
        """Starts the embedded servers that no URL stands in for."""
        folder = self._running.folder
        sockets = folder.sockets()
        if embed_redis:
            with self._witness.step("Valkey"):
                launch = valkey.launch(folder.valkey, sockets / "valkey.sock", log=folder.log("redis"))
                await self._running.bring_up([launch], tasks=tasks, parent_fd=self._parent_fd)
        if embed_postgres:
            if not postgres.is_initialized(folder.postgres):
                with self._witness.step("PostgreSQL, making its data folder"):
                    await postgres.initialize(folder.postgres)
            with self._witness.step("PostgreSQL"):
                launch = postgres.launch(folder.postgres, sockets, log=folder.log("postgres"))
                await self._running.bring_up([launch], tasks=tasks, parent_fd=self._parent_fd)

    async def migrate(self) -> None:
        """Brings both schemas to their newest version."""
        with self._witness.step("migrations"):
            async with asyncio.TaskGroup() as tasks:
                for service in plans.WITH_DATABASE:
                    tasks.create_task(_migrate(self._running.plan, self._running.folder, service=service))

    async def processes(self, tasks: asyncio.TaskGroup) -> None:
        """Starts the five processes and the worker, all at once."""
        plan, folder = self._running.plan, self._running.folder
        launches = [*plans.service_launches(plan, folder), *plans.worker_launches(plan, folder)]
        what = "registry, dispatcher, execution, state, gateway"
        if plan.workers is not None:
            what += ", worker"
        with self._witness.step(what):
            await self._running.bring_up(launches, tasks=tasks, parent_fd=self._parent_fd)


async def _migrate(plan: Plan, folder: Folder, *, service: str) -> None:
    path = folder.log(f"migrate.{service}")
    with path.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"mainspring_{service}",
            "migrate",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=plans.migration_env(plan, service),
            start_new_session=True,
        )
    try:
        async with asyncio.timeout(_MIGRATION_SECONDS_MAX):
            returncode = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if returncode != 0:
        raise StartError(
            f"The migration of {service} failed with exit code {returncode}; nothing else was started. "
            f"Its log {path} ends with:\n{tail(path)}"
        )


def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="mainspring-", ignore_cleanup_errors=True)


@contextmanager
def parent_pipe() -> Iterator[int]:
    """The end that children inherit; nobody else holds the other one, so it tells them when this process dies."""
    read, write = os.pipe()
    try:
        yield read
    finally:
        os.close(write)
        os.close(read)


def _end_leftovers(folder: Folder) -> None:
    """Ends what a killed predecessor has started and is still stopping: PostgreSQL in peace, the others at once."""
    left = []
    for pid, started in folder.noted_pids().items():
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            # The same pid and the same moment of birth: it is that process, not a stranger with its number.
            if abs(process.create_time() - started) < 1.0:
                process.send_signal(signal.SIGINT if process.name() == "postgres" else signal.SIGKILL)
                left.append(process)
    _, alive = psutil.wait_procs(left, timeout=LEFTOVER_SECONDS_MAX)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=LEFTOVER_SECONDS_MAX)


def _innermost(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What went wrong, without the task groups around it."""
    told, _ = group.split(StartError)
    error: BaseException = told or group
    while isinstance(error, BaseExceptionGroup) and (told is not None or len(error.exceptions) == 1):
        error = error.exceptions[0]
    return error
