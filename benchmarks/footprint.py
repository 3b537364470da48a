"""W8: how much memory the idle stack takes, and how long `mainspring dev` takes until everything serves.

The first start makes the data folder and the tables, a second one finds them. Memory is read some seconds after the
last start, when start-up work is over and nobody asks for anything.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import Report, Slice, cpu_seconds, memory, parser, progress, yardstick

SECONDS_DEFAULT: Final = 5.0
READY_SECONDS_MAX: Final = 120.0
STOP_SECONDS_MAX: Final = 30.0
POLL_SECONDS: Final = 0.01
PROCESSES: Final = ("registry", "dispatcher", "execution", "state", "gateway")
NOTE: Final = "runs that wait are measured by python -m benchmarks.waiting"


def main() -> int:
    """Runs the workload and prints its report."""
    options = parser("footprint", __doc__ or "")
    options.set_defaults(seconds=SECONDS_DEFAULT)
    arguments = options.parse_args()
    report = Report.begin("footprint", arguments.seed)
    report.notes.append(NOTE)
    asyncio.run(_measure(report, arguments.seconds, arguments.repeat))
    report.show(as_json=arguments.json)
    return 0


async def _measure(report: Report, seconds: float, repeat: int) -> None:
    """`seconds`: how long the stack is left alone before its memory is read."""
    first: list[Slice] = []
    second: list[Slice] = []
    idle: list[Slice] = []
    for number in range(repeat):
        with tempfile.TemporaryDirectory(prefix="mainspring-bench-") as folder:
            progress(f"first start, {number + 1} of {repeat}")
            async with _start(Path(folder), first):
                pass
            progress(f"second start, {number + 1} of {repeat}")
            async with _start(Path(folder), second) as pids:
                await asyncio.sleep(seconds)
                idle.append(Slice(_sizes(pids), second[-1].speed))
    report.add("first", first)
    report.add("second", second)
    report.add("", idle)


@asynccontextmanager
async def _start(folder: Path, slices: list[Slice]) -> AsyncIterator[dict[str, list[int]]]:
    """`mainspring dev` while the block runs: its processes by name."""
    ready_file = folder / "ready.json"
    ready_file.unlink(missing_ok=True)
    before = yardstick()
    begin = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mainspring", "dev", "--port", "0"),
        *("--data-dir", str(folder / "data"), "--ready-file", str(ready_file)),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        described = await _ready(ready_file, process)
        seconds = time.perf_counter() - begin
        figures = {"ready_seconds": seconds, "ready_cpu_seconds": cpu_seconds(process.pid)}
        slices.append(Slice(figures, min(before, yardstick())))
        yield {"mainspring dev": [process.pid], **described["pids"]}
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        async with asyncio.timeout(STOP_SECONDS_MAX):
            await process.wait()


async def _ready(file: Path, process: asyncio.subprocess.Process) -> dict[str, Any]:
    """What the ready file says, as soon as it is there; Any: JSON."""
    async with asyncio.timeout(READY_SECONDS_MAX):
        while (described := _read(file)) is None:
            if process.returncode is not None:
                raise RuntimeError(f"mainspring dev ended with {process.returncode} before it was ready")
            await asyncio.sleep(POLL_SECONDS)
    return described


def _read(file: Path) -> dict[str, Any] | None:
    """The JSON in the file, None without a file; Any: JSON."""
    described: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
    return described


def _sizes(pids: dict[str, list[int]]) -> dict[str, float]:
    """MiB of each process, of the five together and of everything."""
    # The supervisor's children are the others.
    used = memory(pids, alone=("mainspring dev",))
    figures = {
        f"{kind}_mib_{name.replace(' ', '_')}": sizes[kind] for name, sizes in used.items() for kind in ("rss", "pss")
    }
    for kind in ("rss", "pss"):
        figures[f"{kind}_mib_five_processes"] = sum(used[name][kind] for name in PROCESSES)
        figures[f"{kind}_mib_everything"] = sum(sizes[kind] for sizes in used.values())
    return figures


if __name__ == "__main__":
    sys.exit(main())
