"""W5, cancel: from the cancel sent to the tool stopped, by the tool's own counter, which must then stand still.

So many users, each again and again: a run whose tool counts in a file with the time of each count; when it counts, a
cancel on the socket; its end; and a look at the file then and a while later, between which nothing may have changed.
"""

from __future__ import annotations

import asyncio
import struct
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson
from mainspring.dev import Stack, stack

from benchmarks.harness import Cpu, Report, Slice, carry_out, parser, percentile, progress, repeated, yardstick
from benchmarks.load import note_database, register
from benchmarks.sockets import TERMINAL
from benchmarks.tools import COUNT

USERS: Final = 16
ANSWER_SECONDS_MAX: Final = 20.0
POLL_SECONDS: Final = 0.002
POLLS_MAX: Final = 5_000
# How long the counter is watched after the run's end; it counts every five milliseconds.
STILL_SECONDS: Final = 0.1
AGENT: Final = orjson.dumps(
    {
        "apiVersion": "mainspring/v1",
        "kind": "Agent",
        "name": "counting",
        "model": {
            "provider": "scripted",
            "script": [
                {"text": "I count.", "calls": [{"tool": "benchmark.count", "arguments": {"file": "{{input.file}}"}}]},
                {"text": "Done.", "result": {}},
            ],
        },
        "tools": ["benchmark.count"],
        "limits": {"timeout": "60s"},
    }
)

# Frames are JSON: Any.
Frame = dict[str, Any]


@dataclass(slots=True)
class Tally:
    """What a slice has seen, in seconds from the cancel sent."""

    stopped: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    acknowledged: int = 0
    faults: list[str] = field(default_factory=list)


def main() -> int:
    """Runs the workload and prints its report; exit code 1 when a tool went on counting."""
    options = parser("cancel", __doc__ or "")
    options.add_argument("--users", type=int, default=USERS, help=f"runs under way at a time (default {USERS})")
    return carry_out("cancel", _measure, options.parse_args())


async def _measure(report: Report, arguments: Namespace) -> None:
    async with AsyncExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="mainspring-bench-")))
        progress("starting the platform")
        running = await held.enter_async_context(
            stack(data_dir=folder / "data", workers=["benchmarks.tools"], log_level="warning")
        )
        await note_database(running, report)
        await register(running, AGENT)
        users = [
            await held.enter_async_context(_connected(running, number, folder / f"count-{number}"))
            for number in range(arguments.users)
        ]
        await asyncio.gather(*(user.cancel_one(Tally()) for user in users))
        measure = partial(_slice, running, users, arguments.seconds, report)
        report.add("", await repeated(measure, arguments.repeat, title=f"{len(users)} users"))


def _connected(running: Stack, number: int, file: Path) -> User:
    return User(running.gateway, running.mint(user=f"user-{number}"), file)


async def _slice(running: Stack, users: Sequence[User], seconds: float, report: Report) -> Slice:
    speed = yardstick()
    tally = Tally()
    cpu = Cpu(running.pids)
    end = time.monotonic() + seconds

    async def repeat(user: User) -> None:
        while time.monotonic() < end:
            await user.cancel_one(tally)

    await asyncio.gather(*map(repeat, users))
    report.cpu_seconds[f"slice {len(report.cpu_seconds) + 1}"] = cpu.used()
    report.faults += tally.faults
    speed = min(speed, yardstick())
    figures = {
        "cancel_to_stopped_p50_ms": percentile(tally.stopped, 0.5) * 1e3,
        "cancel_to_stopped_p99_ms": percentile(tally.stopped, 0.99) * 1e3,
        "cancel_to_event_p50_ms": percentile(tally.ended, 0.5) * 1e3,
        "cancel_to_event_p99_ms": percentile(tally.ended, 0.99) * 1e3,
        "acknowledged_share": tally.acknowledged / max(1, len(tally.ended)),
        "runs": len(tally.ended),
        "yardstick": speed,
    }
    return Slice(figures, speed)


class User:
    """A socket, and the file in which its runs' tool counts."""

    def __init__(self, gateway: str, token: str, file: Path) -> None:
        self._url = f"{gateway}/v1/stream"
        self._headers = {"Authorization": f"Bearer {token}"}
        self._file = file
        self._opened = AsyncExitStack()
        self._socket: aiohttp.ClientWebSocketResponse | None = None

    async def __aenter__(self) -> User:
        session = await self._opened.enter_async_context(aiohttp.ClientSession(headers=self._headers))
        self._socket = await self._opened.enter_async_context(session.ws_connect(self._url))
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._opened.aclose()

    async def cancel_one(self, tally: Tally) -> None:
        """Starts a run, cancels it while its tool counts, and looks whether that stops."""
        self._file.unlink(missing_ok=True)
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            await self._send(op="start", id="start", agent="counting", input={"file": str(self._file)})
            started = await self._until("started", "error")
            if started["op"] == "error":
                tally.faults.append(f"{started['reason']}: {started['message']}")
                return
            for _ in range(POLLS_MAX):
                if self._last_count()[0]:
                    break
                await asyncio.sleep(POLL_SECONDS)
            sent_time = time.time()
            await self._send(op="cancel", id="cancel", run_id=started["run_id"])
            frame = await self._until("event")
            while frame["type"] not in TERMINAL:
                frame = await self._until("event")
        ended_time = time.time()
        counted = self._last_count()
        await asyncio.sleep(STILL_SECONDS)
        if self._last_count() != counted:
            tally.faults.append(f"the tool of run {started['run_id']} counts on after {frame['type']}")
            return
        if frame["type"] != "agent_cancelled":
            tally.faults.append(f"run {started['run_id']} ended with {frame['type']}")
            return
        tally.stopped.append(max(0.0, counted[1] - sent_time))
        tally.ended.append(ended_time - sent_time)
        tally.acknowledged += all(row["acknowledged"] for row in frame["data"]["receipt"])

    async def _send(self, **frame: object) -> None:
        assert self._socket is not None
        await self._socket.send_str(orjson.dumps(frame).decode())

    async def _until(self, *operations: str) -> Frame:
        """The next frame of one of these kinds."""
        assert self._socket is not None
        while True:
            frame: Frame = orjson.loads(await self._socket.receive_str())
            if frame["op"] in operations:
                return frame

    def _last_count(self) -> tuple[int, float]:
        """How far the tool has counted, and when it last did; nothing before it begins."""
        try:
            return COUNT.unpack(self._file.read_bytes())
        except (FileNotFoundError, struct.error):
            return 0, 0.0


if __name__ == "__main__":
    sys.exit(main())
