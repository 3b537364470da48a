"""Our end of the line protocol: a peer's program as a child process, and its variants as subjects of measurement."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import orjson

from benchmarks.harness import Cpu, Report, Slice, percentile, under_test, yardstick
from benchmarks.peers.environment import SOURCES, UnavailableError

PREPARE_SECONDS_MAX: Final = 90.0
WAIT_SECONDS_MAX: Final = 8.0
# Runs that are given up may go on inside the peer and disturb who is measured next.
DRAIN_SECONDS_MAX: Final = 40.0
STOP_SECONDS_MAX: Final = 10.0

_GRACE_SECONDS: Final = 15.0
_LINE_BYTES_MAX: Final = 16 << 20
_LOG_BYTES_SHOWN: Final = 600


class Child:
    """A peer's program under way."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log
        self.pids: Mapping[str, Sequence[int]] = {}
        self.versions: Mapping[str, str] = {}

    async def prepare(self, *, database_url: str, redis_url: str, folder: Path, callers: int) -> None:
        """Lets it start what it needs."""
        urls = {"database_url": database_url, "redis_url": redis_url}
        await self._send(op="prepare", **urls, folder=str(folder), callers=callers)
        ready = await self._receive(PREPARE_SECONDS_MAX)
        self.pids, self.versions = ready["pids"], ready["versions"]

    async def run(
        self, variant: str, callers: int, *, seconds: float, counted: Mapping[str, Sequence[int]]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """A slice, and the CPU seconds that these processes used while it counted. Any: JSON."""
        limits = {"wait_seconds": WAIT_SECONDS_MAX, "drain_seconds": DRAIN_SECONDS_MAX}
        await self._send(op="run", variant=variant, callers=callers, seconds=seconds, **limits)
        await self._receive(WAIT_SECONDS_MAX + _GRACE_SECONDS)
        cpu = Cpu(counted)
        await self._receive(seconds + WAIT_SECONDS_MAX + _GRACE_SECONDS)
        used = cpu.used()
        return await self._receive(DRAIN_SECONDS_MAX + _GRACE_SECONDS), used

    async def _send(self, **message: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(orjson.dumps(message) + b"\n")
        with suppress(ConnectionResetError, BrokenPipeError):  # it died: its answer will be missing, with the reason
            await self._process.stdin.drain()

    async def _receive(self, seconds: float) -> dict[str, Any]:
        """The next line. Any: JSON."""
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(seconds):
                line = await self._process.stdout.readline()
        except TimeoutError as error:
            self._process.kill()  # what it says later would be taken for the answer to something else
            raise UnavailableError(f"it did not answer in {seconds:g} s; {self._said()}") from error
        if not line:
            raise UnavailableError(f"its program ended; {self._said()}")
        message: dict[str, Any] = orjson.loads(line)
        if "error" in message:
            raise UnavailableError(f"{message['error']}; {self._said()}")
        return message

    def _said(self) -> str:
        end = self._log.read_bytes()[-_LOG_BYTES_SHOWN:].decode(errors="replace").strip()
        return f"it said last: {end}" if end else "it said nothing"


@asynccontextmanager
async def child(python: Path, module: str, *, log: Path) -> AsyncIterator[Child]:
    """Runs a program that speaks the line protocol; at the end nothing of its process group is left."""
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            str(python),
            "-m",
            module,
            cwd=SOURCES.parents[1],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            limit=_LINE_BYTES_MAX,
            start_new_session=True,
        )
    assert process.stdin is not None
    try:
        yield Child(process, log)
    finally:
        process.stdin.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS_MAX):
                await process.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


class PeerLoad:
    """One variant of a peer under back-to-back runs: a `Subject`. `others` work for it beside its own processes."""

    def __init__(
        self, name: str, variant: str, *, peer: Child, others: Mapping[str, Sequence[int]], report: Report
    ) -> None:
        self.name = name
        self._variant = variant
        self._peer = peer
        self._pids = {**peer.pids, **others}
        self._report = report

    async def measure(self, callers: int, seconds: float) -> Slice:
        """A slice with so many callers; faults go to the report as notes, for they are not ours."""
        speed = yardstick()
        ran, used = await self._peer.run(self._variant, callers, seconds=seconds, counted=self._pids)
        speed = min(speed, yardstick())
        self._report.notes += [f"{self.name}, {callers} callers: {fault}" for fault in ran["faults"][:1]]
        return Slice(figures_of(ran["durations"], ran["seconds"], used) | {"yardstick": speed}, speed)

    def idle_cpu(self) -> Cpu:
        """What its processes use from now on."""
        return Cpu(self._peer.pids)


def figures_of(durations: Sequence[float], seconds: float, used: Mapping[str, float]) -> dict[str, float]:
    """A peer's figures of a slice; latency and CPU of a run are nan when none ended."""
    runs = len(durations) or float("nan")
    return {
        "runs_per_second": len(durations) / seconds,
        "p50_ms": percentile(durations, 0.5) * 1e3,
        "p99_ms": percentile(durations, 0.99) * 1e3,
        "cpu_ms_per_run": under_test(used) / runs * 1e3,
    }
