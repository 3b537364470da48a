"""W1: N sockets, each back to back, from `start` to `agent_completed` of the scripted look-up run.

Two model steps, one pure tool, six events of five kinds, all durable, all delivered. A run counts only if its log came
whole.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

import aiohttp
import uvloop
from mainspring.dev import Stack, stack

from benchmarks.harness import YARDSTICK_FALL_MAX, Cpu, Report, median, parser, percentile, yardstick
from benchmarks.sockets import RunLoop, Tally, connect

AGENT = Path(__file__).resolve().parents[1] / "examples" / "lookup" / "agent.yaml"
# Started, thinking, executing, completed, thinking, completed: each model step is an event of its own.
EVENTS_PER_RUN = 6
WARM_UP_SECONDS = 2.0


def main() -> int:
    """Runs the workload and prints its report; exit code 1 when a run was not whole."""
    options = parser("throughput", __doc__ or "")
    options.add_argument("--sockets", type=int, nargs="+", default=[1, 64, 256], help="how many (default 1 64 256)")
    options.add_argument("--repeat", type=int, default=3, help="slices for each number of sockets (default 3)")
    options.add_argument("--replicas", default="", help="as of `mainspring dev`, e.g. execution=2")
    arguments = options.parse_args()
    report = Report("throughput", arguments.seed)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        whole = runner.run(_measure(report, arguments.sockets, arguments.seconds, arguments.repeat, arguments.replicas))
    report.show(as_json=arguments.json)
    return 0 if whole else 1


async def _measure(report: Report, sockets: list[int], seconds: float, repeat: int, replicas: str) -> bool:
    counts = {name: int(count) for name, _, count in (part.partition("=") for part in replicas.split(",") if part)}
    with tempfile.TemporaryDirectory(prefix="mainspring-bench-") as folder:
        async with stack(data_dir=Path(folder), replicas=counts, log_level="warning") as running:
            await _register(running)
            loops = await _connect(running, max(sockets))
            await _slice(running, loops[: min(16, len(loops))], WARM_UP_SECONDS, Report("warm-up", 0), "")
            faults: list[str] = []
            for count in sockets:
                faults += await _series(running, loops[:count], seconds, repeat, report)
    report.notes += [f"fault: {fault}" for fault in faults[:10]]
    return not faults


async def _register(running: Stack) -> None:
    headers = {"Authorization": f"Bearer {running.token}", "Content-Type": "application/yaml"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{running.gateway}/v1/agents", data=AGENT.read_bytes()) as answer,
    ):
        if answer.status >= 300:
            raise RuntimeError(f"the look-up agent was not registered: {await answer.text()}")


async def _connect(running: Stack, count: int) -> list[RunLoop]:
    url = running.gateway.replace("http://", "ws://") + "/v1/stream"
    start: dict[str, object] = {"op": "start", "id": "1", "agent": "lookup", "input": {"value": "forty-two"}}
    return [await connect(url, running.mint(user=f"user-{number}"), start, EVENTS_PER_RUN) for number in range(count)]


async def _series(running: Stack, loops: list[RunLoop], seconds: float, repeat: int, report: Report) -> list[str]:
    """Repeats a slice, drops those in which the machine fell behind, and reports medians."""
    slices: list[tuple[float, dict[str, float]]] = []
    faults: list[str] = []
    for number in range(repeat):
        speed, figures, found = await _slice(
            running, loops, seconds, report, f"{len(loops)} sockets, slice {number + 1}"
        )
        slices.append((speed, figures))
        faults += found
    best = max(speed for speed, _ in slices)
    kept = [figures for speed, figures in slices if speed >= best * (1 - YARDSTICK_FALL_MAX)]
    report.slices_discarded += len(slices) - len(kept)
    report.add(str(len(loops)), {name: median(figures[name] for figures in kept) for name in kept[0]})
    return faults


async def _slice(
    running: Stack, loops: list[RunLoop], seconds: float, report: Report, name: str
) -> tuple[float, dict[str, float], list[str]]:
    speed = yardstick()
    tally = Tally()
    cpu = Cpu(running.pids)
    clock = asyncio.get_running_loop().time
    start = clock()
    for loop in loops:
        loop.begin(tally)
    await asyncio.sleep(seconds)
    elapsed, used = clock() - start, cpu.used()
    counted = Tally(list(tally.durations), list(tally.first_events), list(tally.faults))
    for loop in loops:
        loop.end()
    async with asyncio.timeout(30):
        for loop in loops:
            await loop.idle.wait()
    runs = max(1, len(counted.durations))
    report.cpu_seconds[name] = used
    platform_seconds = sum(value for process, value in used.items() if process != "load generator")
    figures = {
        "runs_per_second": len(counted.durations) / elapsed,
        "p50_ms": percentile(counted.durations, 0.5) * 1e3,
        "p99_ms": percentile(counted.durations, 0.99) * 1e3,
        "first_event_p50_ms": percentile(counted.first_events, 0.5) * 1e3,
        "cpu_ms_per_run": platform_seconds / runs * 1e3,
        "yardstick": speed,
    }
    figures |= {f"cpu_ms_per_run_{process.replace(' ', '_')}": value / runs * 1e3 for process, value in used.items()}
    return speed, figures, counted.faults


if __name__ == "__main__":
    sys.exit(main())
