"""Takeover times of the fault drill: who counts, and from which moment on."""

from __future__ import annotations

import pytest

from benchmarks.faults.client import Opening
from benchmarks.faults.runs import Run, Seen
from benchmarks.faults.takeover import takeovers
from benchmarks.faults.weather import Fault

pytestmark = pytest.mark.unit

STOP = Fault("state", 0, "stop", 10.0, 10.0)
KINDS = ["agent_started", "agent_thinking", "agent_completed"]


def run(*times: float, pause_seconds: float = 0.0, acknowledged: float = 9.0) -> Run:
    """A run whose events came at these times."""
    seen = Seen([0] * len(times), list(times), KINDS[: len(times)])
    return Run("key", "ann", b"", 0, pause_seconds, run_id="run-1", acknowledged_time=acknowledged, seen=seen)


@pytest.mark.parametrize(
    ("fault", "stalled", "expected"),
    [
        (STOP, run(9.0, 12.5, 12.6), [2.5]),
        (STOP, run(9.0, 10.1, 12.6), []),  # its next event came at once
        (STOP, run(8.0, 8.5, 9.5), []),  # it had ended
        (STOP, run(11.0, 12.0, acknowledged=10.5), []),  # it began later
        (STOP, run(9.0, 9.1, 12.0, pause_seconds=1.9), [1.0]),  # it rested until 11
        (STOP, run(12.0, 12.1), [2.0]),  # acknowledged, with nothing shown yet
        (Fault("postgres", 0, "refuse", 10.0, 13.0), run(9.0, 13.4), [0.4]),  # nobody could have gone on before
        (Fault("postgres", 0, "slow", 10.0, 13.0), run(9.0, 12.0), []),  # it went on in the middle of the fault
    ],
)
def test_counted_is_who_was_stalled_from_when_on_somebody_could_have_gone_on(
    fault: Fault, stalled: Run, expected: list[float]
) -> None:
    assert takeovers([fault], [stalled], {}) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("gateway", "expected"),
    [
        (1, [1.5]),  # from the welcome of the next one
        (0, [2.5]),  # it was connected elsewhere: from the fault
    ],
)
def test_who_was_at_the_gateway_that_went_away_counts_from_its_next_welcome(
    gateway: int, expected: list[float]
) -> None:
    fault = Fault("gateway", 1, "kill", 10.0, 10.0)
    openings = [Opening(1.0, gateway), Opening(11.0, 1 - gateway)]
    assert takeovers([fault], [run(9.0, 12.5)], {"ann": openings}) == pytest.approx(expected)
