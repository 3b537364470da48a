"""A running local stack: where everything is, the ready file that says so, and how to trouble and to end it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import orjson
import psutil

from mainspring.dev import plan as plans
from mainspring.dev.child import Child
from mainspring.dev.folder import Folder, write_whole
from mainspring.dev.guard import Guard
from mainspring.dev.plan import Plan
from mainspring.dev.witness import Witness
from mainspring.embedded.launch import Launch
from mainspring.tokens import user_token

WAIT_SECONDS: Final = 60.0


class Stack:
    """A running stack: where everything is, and how to trouble it."""

    def __init__(
        self, plan: Plan, folder: Folder, *, guard: Guard, ready_files: Sequence[Path], witness: Witness
    ) -> None:
        self.plan = plan
        self.folder = folder
        self._guard = guard
        self._ready_files = ready_files
        self._witness = witness
        self._children: list[Child] = []
        self._supervisors: list[asyncio.Task[None]] = []
        self._is_complete = False
        self._token = plan.token()

    @property
    def gateway(self) -> str:
        """The URL of the first gateway."""
        return self.plan.gateways[0]

    @property
    def gateways(self) -> tuple[str, ...]:
        """The URLs of all gateways."""
        return self.plan.gateways

    @property
    def token(self) -> str:
        """A token of the user `developer`, admin of the tenant `dev`."""
        return self._token

    @property
    def auth_secret(self) -> str:
        """What users' tokens are signed with."""
        return self.plan.secrets.auth

    @property
    def service_secret(self) -> str:
        """What services' tokens are signed with."""
        return self.plan.secrets.service

    @property
    def services(self) -> dict[str, str]:
        """Each gRPC service's addresses, joined by commas."""
        return {name: self.plan.target(name) for name in plans.SERVICES}

    @property
    def database_url(self) -> str:
        """The database as its owner."""
        return self.plan.database_url

    @property
    def service_database_urls(self) -> dict[str, str]:
        """The database as state and as registry connect to it."""
        return self.plan.service_database_urls

    @property
    def redis_url(self) -> str:
        """Redis or Valkey."""
        return self.plan.redis_url

    @property
    def pids(self) -> dict[str, list[int]]:
        """The processes that live now, by name."""
        pids: dict[str, list[int]] = {}
        for child in self._children:
            if child.pid is not None:
                pids.setdefault(child.launch.name, []).append(child.pid)
        return pids

    def mint(self, *, user: str, tenant: str = plans.TENANT, roles: Sequence[str] = ("operator",)) -> str:
        """A token of any user."""
        ttl_seconds = plans.TOKEN_SECONDS
        return user_token(self.auth_secret, tenant=tenant, user=user, roles=roles, ttl_seconds=ttl_seconds)

    def describe(self) -> dict[str, Any]:
        """What the ready file says; Any: JSON."""
        return {
            "gateway": self.gateway,
            "token": self.token,
            "services": self.services,
            "database_url": self.database_url,
            "service_database_urls": self.service_database_urls,
            "redis_url": self.redis_url,
            "pids": self.pids,
        }

    def log(self, name: str, index: int = 0) -> Path:
        """The log file of a process."""
        return self._child(name, index).launch.log

    async def kill(self, name: str, *, index: int = 0, signal: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to a process; returns when a fatal one has ended it. It is started again."""
        await self._child(name, index).signal(signal)

    async def stop(self, name: str, *, index: int = 0) -> None:
        """Stops a process and keeps it down until `start`."""
        await self._child(name, index).stop()

    async def start(self, name: str, *, index: int = 0) -> None:
        """Starts a process that `stop` has stopped, and waits until it serves."""
        child = self._child(name, index)
        child.resume()
        await self._await_serving([child], WAIT_SECONDS)

    async def restart(self, name: str, *, index: int = 0) -> None:
        """Stops a process as an operator would, starts it again and waits until it serves."""
        await self.stop(name, index=index)
        await self.start(name, index=index)

    async def wait_ready(self, *, timeout: float = WAIT_SECONDS) -> None:
        """Returns when every process serves; TimeoutError names those that do not."""
        await self._await_serving(self._children, timeout)

    def started(self, child: Child) -> None:
        """A process has a new pid."""
        self._guard.watch(self._children)
        self._note_pids()
        self._write_ready()

    def serving(self, child: Child, *, seconds: float) -> None:
        """A process serves."""
        self._write_ready()
        self._witness.serving(child, seconds=seconds)

    def ended(self, child: Child, *, returncode: int, restart_seconds: float) -> None:
        """A process died."""
        self._guard.watch(self._children)
        self._witness.ended(child, returncode=returncode, restart_seconds=restart_seconds)

    async def bring_up(self, launches: Iterable[Launch], *, tasks: asyncio.TaskGroup, parent_fd: int) -> None:
        """Starts processes and returns when all of them serve."""
        children = [Child(launch, parent_fd=parent_fd, owner=self) for launch in launches]
        self._children.extend(children)
        self._supervisors.extend(tasks.create_task(child.supervise()) for child in children)
        for child in children:
            await child.serving.wait()

    def complete(self) -> None:
        """Everything serves: the ready file says so, from now on after each restart too."""
        self._is_complete = True
        self._write_ready()

    async def shut_down(self) -> None:
        """Stops all processes in order, replicas together."""
        self._is_complete = False
        for path in self._ready_files:
            path.unlink(missing_ok=True)
        for name in plans.STOP_ORDER:
            async with asyncio.TaskGroup() as tasks:
                for child in self._children:
                    if child.launch.name == name:
                        tasks.create_task(child.stop())
        self._guard.watch(())
        for supervisor in self._supervisors:
            supervisor.cancel()

    def _child(self, name: str, index: int) -> Child:
        for child in self._children:
            if child.launch.name == name and child.launch.index == index:
                return child
        known = ", ".join(sorted({child.launch.label for child in self._children}))
        raise LookupError(f"This stack has no process {name} {index}; it has {known}.")

    async def _await_serving(self, children: Sequence[Child], seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                for child in children:
                    await child.serving.wait()
        except TimeoutError as error:
            late = ", ".join(child.launch.label for child in children if not child.serving.is_set())
            raise TimeoutError(f"After {seconds:g} s these do not serve: {late}.") from error

    def _write_ready(self) -> None:
        if self._is_complete:
            text = orjson.dumps(self.describe(), option=orjson.OPT_INDENT_2).decode()
            for path in self._ready_files:
                write_whole(path, text)

    def _note_pids(self) -> None:
        started = {}
        for child in self._children:
            if child.pid is not None:
                try:
                    started[child.pid] = psutil.Process(child.pid).create_time()
                except psutil.NoSuchProcess:
                    continue
        self.folder.note_pids(started)
