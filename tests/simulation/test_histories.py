"""Whatever is killed, stopped, cut off, late or sent twice: the invariants hold in every history, at every step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.simulation

ROOT = Path(__file__).parents[2]


def run_simulation(*arguments: str, timeout_seconds: float) -> tuple[int, str]:
    """Plays histories in processes of their own, where no clock but theirs is changed; exit code and output."""
    command = [sys.executable, "-m", "tests.simulation", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_seconds)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.timeout(320)
def test_every_invariant_holds_in_500_histories() -> None:
    code, output = run_simulation("1", "--histories", "500", "--processes", "2", timeout_seconds=300)
    assert code == 0, output


@pytest.mark.long
@pytest.mark.timeout(1_200)
def test_every_invariant_holds_in_10_000_histories() -> None:
    code, output = run_simulation("1000000", "--histories", "10000", "--processes", "2", timeout_seconds=1_100)
    assert code == 0, output


@pytest.mark.parametrize(
    "seed", ["1002435", "1003328", "1248", "4383", "5278", "1007346", "3008877", "2337", "543", "4689", "1004069"]
)
def test_histories_that_once_found_a_fault(seed: str) -> None:
    # 1002435: a run claimed late, which had ended after a cancel meanwhile, kept its executor busy for ever.
    # 1003328: an executor that had stood still asked a model again for a run that was another's by then.
    # 1248, 4383: a queued run that was handed over late was begun, and its model asked, by who no longer held it.
    # 5278: a watcher of a run whose start had no answer in time was forgotten with that start.
    # 1007346: what another state process had told was missed, and the log not read as the database was away just then.
    # 3008877: of two claims of a run that came to one executor, the older came last and made the newer one be given up.
    # 2337: a resume that was told before its pause was done with; then came the pause, and nobody let the run go on.
    # 4689: a pause that a resume had overtaken left no event, was told again, late, and taken for new.
    # 1004069: a pause that had overtaken an earlier one and its resume: the resume ended it, and the earlier one held.
    # 543: who had taken leave to make an unsafe call again died of it, and the next one took the same leave.
    code, output = run_simulation(seed, timeout_seconds=60)
    assert code == 0, output


def test_a_history_is_the_same_in_each_replay() -> None:
    first, second = (run_simulation("7", timeout_seconds=60) for _ in range(2))
    assert first == second
    assert "all invariants hold" in first[1]
