"""What each figure should be: the goals that docs/benchmarks.md shows beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Goal:
    """One figure, what it is called on the page, and the least or the most that it should be; None: no goal."""

    figure: str
    title: str
    at_least: float | None = None
    at_most: float | None = None

    def text(self) -> str:
        """The goal as the page writes it."""
        if self.at_least is not None:
            return f"≥ {self.at_least:,g}"
        return "" if self.at_most is None else f"≤ {self.at_most:,g}"

    def is_met(self, value: float) -> bool | None:
        """Whether a value meets it; None without a goal."""
        if self.at_least is not None:
            return value >= self.at_least
        return None if self.at_most is None else value <= self.at_most


def _growth(call: str, title: str) -> list[Goal]:
    found = []
    for kind, sizes, what in (("run", (10, 10_000), "run length"), ("table", (1_000, 1_000_000), "rows")):
        for size in sizes:
            found.append(Goal(f"{call}_{kind}_{size}_ms", f"{title}, {what} {size:,}: median, ms"))
            found.append(Goal(f"{call}_{kind}_{size}_cpu_ms", f"{title}, {what} {size:,}: CPU, ms"))
        between = f"{sizes[1]:,} by {sizes[0]:,}"
        found.append(Goal(f"{call}_{kind}_ratio", f"**{title}, {what} {between}: CPU**", at_most=1.2))
        found.append(Goal(f"{call}_{kind}_latency_ratio", f"**{title}, {what} {between}: latency**", at_most=1.2))
    return found


GOALS: Final[Mapping[str, Sequence[Goal]]] = {
    "throughput": [
        Goal("runs_per_second_64", "64 sockets: runs a second", at_least=1_500),
        Goal("p50_ms_64", "64 sockets: p50, ms"),
        Goal("p99_ms_64", "64 sockets: p99, ms", at_most=90),
        Goal("cpu_ms_per_run_64", "64 sockets: CPU of all processes a run, ms", at_most=1.2),
        Goal("runs_per_second_1", "1 socket: runs a second"),
        Goal("p50_ms_1", "1 socket: p50, ms", at_most=5),
        Goal("p99_ms_1", "1 socket: p99, ms", at_most=12),
        Goal("cpu_ms_per_run_1", "1 socket: CPU of all processes a run, ms"),
        Goal("runs_per_second_256", "256 sockets: runs a second (no slower than 64)"),
        Goal("p99_ms_256", "256 sockets: p99, ms"),
        Goal("cpu_ms_per_run_256", "256 sockets: CPU of all processes a run, ms"),
        Goal("heavy_runs_per_second_64", "W1b, 64 sockets: runs a second", at_least=60),
        Goal("heavy_p50_ms_64", "W1b, 64 sockets: p50, ms"),
        Goal("heavy_cpu_ms_per_run_64", "W1b, 64 sockets: CPU of all processes a run, ms"),
        Goal("heavy_stored_ratio", "W1b: stored bytes by bytes of tool results", at_most=1.3),
    ],
    "latency": [
        Goal("rate", "starts a second (half of the peak)"),
        Goal("start_to_first_event_p50_ms", "start to first event: p50, ms", at_most=5),
        Goal("start_to_first_event_p99_ms", "start to first event: p99, ms", at_most=15),
        Goal("commit_to_frame_p50_ms", "commit to frame at the client: p50, ms", at_most=5),
        Goal("commit_to_frame_p99_ms", "commit to frame at the client: p99, ms", at_most=15),
        Goal("step_overhead_p50_ms", "end of a tool call to the next, a model step between: p50, ms", at_most=5),
        Goal("step_overhead_p99_ms", "end of a tool call to the next, a model step between: p99, ms", at_most=15),
        Goal("pacing_late_p99_ms", "the load generator's own lateness: p99, ms"),
        Goal("cpu_ms_per_run", "CPU of all processes a run, ms"),
    ],
    "cancel": [
        Goal("cancel_to_stopped_p50_ms", "cancel sent to the tool's last count: p50, ms"),
        Goal("cancel_to_stopped_p99_ms", "cancel sent to the tool's last count: p99, ms", at_most=250),
        Goal("cancel_to_event_p50_ms", "cancel sent to `agent_cancelled` at the client: p50, ms"),
        Goal("cancel_to_event_p99_ms", "cancel sent to `agent_cancelled` at the client: p99, ms"),
        Goal("acknowledged_share", "receipts in which the tool said that it stopped, share", at_least=1),
    ],
    "growth": [
        *_growth("append", "append"),
        *_growth("page_read", "page read"),
        *_growth("start", "start"),
        Goal("bytes_per_turn_2", "stored bytes of turn 2"),
        Goal("bytes_per_turn_200", "stored bytes of turn 200"),
        Goal("bytes_ratio", "**stored bytes, turn 200 by turn 2**", at_most=1.1),
    ],
    "footprint": [
        Goal("ready_seconds_first", "`mainspring dev` to ready, the first time, s", at_most=12),
        Goal("ready_seconds_second", "`mainspring dev` to ready, later, s", at_most=4),
        Goal("ready_cpu_seconds_first", "CPU of that, the first time, s"),
        Goal("ready_cpu_seconds_second", "CPU of that, later, s"),
        Goal("pss_mib_five_processes", "the five processes together, MiB (shared pages once: PSS)", at_most=400),
        Goal("rss_mib_five_processes", "the same with shared pages counted in each (sum of RSS), MiB"),
        *(
            Goal(f"pss_mib_{name}", f"{name}, MiB (PSS)")
            for name in ("registry", "dispatcher", "execution", "state", "gateway", "worker", "postgres", "redis")
        ),
        Goal("pss_mib_everything", "everything that `mainspring dev` starts, MiB (PSS)"),
    ],
}
