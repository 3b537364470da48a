"""How long runs stood still after each fault: takeover times, from what clients saw of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from benchmarks.faults.client import Opening
from benchmarks.faults.runs import Run
from benchmarks.faults.weather import Fault

# A run that was so much later than its own rest has been held up; at half load others are not.
STALL_SECONDS: Final = 0.3


def takeovers(faults: Iterable[Fault], runs: Sequence[Run], openings: Mapping[str, Sequence[Opening]]) -> list[float]:
    """The takeover time of every run that a fault has stalled, in seconds, for all faults.

    A run is under way at a fault when its start was acknowledged before the fault and its terminal event came after.
    Its takeover time runs from the fault to its next new event on its user's socket: so it counts the detection, the
    claim, the fold, the commit and the way back. It begins later

    - where nobody could have gone on during the fault (PostgreSQL stopped, killed, restarted, refusing, slow or full;
      a process without a replica): at the fault's end, when the server serves again;
    - for who was connected to a gateway that went away: when that client was welcomed by another one;
    - where the run was resting (a tool that sleeps, a model that thinks): when its longest rest is over.

    Counted is who was stalled: whose next event came more than STALL_SECONDS after that moment. The others went on as
    if nothing had been, and would only make the figure look better.
    """
    found = []
    for fault in faults:
        for run in runs:
            seconds = _takeover(fault, run, openings.get(run.user, ()))
            if seconds is not None:
                found.append(seconds)
    return found


def _takeover(fault: Fault, run: Run, openings: Sequence[Opening]) -> float | None:
    times = run.seen.times
    if not run.acknowledged_time or run.acknowledged_time >= fault.begin_time or not times:
        return None
    if times[-1] <= fault.begin_time:
        return None
    before = bisect_right(times, fault.begin_time) - 1
    since = max(fault.since_time, _reconnect_time(fault, openings))
    if before >= 0:
        since = max(since, times[before] + run.pause_seconds)
    seconds = times[before + 1] - since
    return seconds if seconds > STALL_SECONDS else None


def _reconnect_time(fault: Fault, openings: Sequence[Opening]) -> float:
    """When a client whose gateway went away was welcomed again; 0: it was not affected."""
    place = bisect_right([opening.time for opening in openings], fault.begin_time)
    if fault.target != "gateway" or not place or openings[place - 1].gateway != fault.index:
        return 0.0
    return openings[place].time if place < len(openings) else 0.0
