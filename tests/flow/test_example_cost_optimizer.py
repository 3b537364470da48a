"""`make run`: the example from nothing to its answer, on its own bill, on another one, and on a broken one."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.cost_optimizer.generate_bill import write_bill
from tests.flow.dev_command import environment

ROOT = Path(__file__).parents[2]
RUN = ROOT / "examples" / "cost_optimizer" / "run.py"
FIVE = {"agent_started", "agent_thinking", "tool_executing", "tool_completed", "agent_completed"}

pytestmark = pytest.mark.timeout(180)


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, RUN, *arguments],
        capture_output=True,
        text=True,
        timeout=150,
        env={**environment(), **variables},
        check=False,
    )


def test_the_committed_bill_is_read_event_by_event_to_an_answer() -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    types = re.findall(r"^ +\d+\.\d{3} s  (\w+)", done.stdout, re.MULTILINE)
    assert set(types) == FIVE
    assert (types[0], types[-1]) == ("agent_started", "agent_completed")
    assert types.count("tool_executing") == types.count("tool_completed") == 4
    assert "6,098 lines, 2026-10-01 to 2026-10-30" in done.stdout
    assert re.search(r"[\d,.]+ of [\d,.]+ US dollars a month can be saved \([\d.]+%\)", done.stdout)
    table = done.stdout.partition("Recommendation")[2]
    assert len(re.findall(r"│ +[\d,]+\.\d\d │ +\d+% │", table)) >= 3


def test_another_bill_gives_other_figures_and_a_broken_one_names_the_line(tmp_path: Path) -> None:
    other = io.StringIO()
    write_bill(other, seed=3, days=12)
    (tmp_path / "other.csv").write_text(other.getvalue())
    done = run(str(tmp_path / "other.csv"))
    assert done.returncode == 0, done.stderr
    assert "2026-10-01 to 2026-10-12" in done.stdout
    assert "of 10,377.97 US dollars" not in done.stdout

    lines = other.getvalue().splitlines()
    lines[6] = lines[6].replace(",compute,", ",,")
    (tmp_path / "broken.csv").write_text("\n".join(lines))
    broken = run(BILL=str(tmp_path / "broken.csv"))
    assert broken.returncode == 1
    assert broken.stderr.count("\n") == 1
    assert "broken.csv, line 7: service is empty" in broken.stderr
    assert "agent_failed" in broken.stdout


def test_a_bill_that_is_no_file_is_refused_before_anything_starts(tmp_path: Path) -> None:
    missing = run(str(tmp_path / "missing.csv"))
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "missing.csv is not a file" in missing.stderr
