"""`make check` on a copy of the repository: it passes as it is, and fails on each change that it is there to stop."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.flow, pytest.mark.long, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
# What make and tests leave behind, and what is shared with the copy.
LEFT_OUT = (".git", ".venv", ".mainspring", "build", "dist", "__pycache__", "*_cache", ".hypothesis")
SOURCES = ("sdk", "services", "gateway")
MAKE_SECONDS = 360


@dataclass(frozen=True, slots=True)
class Change:
    """A change to one file that must not pass, which part of the check sees it, and what that says."""

    path: str
    old: str
    new: str
    target: str
    told: str


CHANGES = {
    "a changed field number": Change(
        "protos/mainspring/v1/state.proto",
        "message GetRunRequest {\n  // The run.\n  string run_id = 1 ",
        "message GetRunRequest {\n  // The run.\n  string run_id = 9 ",
        "check-contracts",
        'Previously present field "1" with name "run_id" on message "GetRunRequest" was deleted',
    ),
    "a forgotten regeneration": Change(
        "protos/mainspring/v1/registry.proto",
        "message ListToolsRequest {",
        "message ListToolsRequest {\n  // Only those of an effect class; unset: all.\n  EffectClass effect = 3;\n",
        "check-generated",
        "sdk/mainspring/v1 is not what protos/ says: run 'make proto'.",
    ),
    "an import against the law": Change(
        "services/mainspring_state/core/feed.py",
        "from __future__ import annotations\n",
        "from __future__ import annotations\n\nimport mainspring_registry.store\n",
        "check-tidy",
        "mainspring_state may not import mainspring_registry.store",
    ),
    "a table without a forced policy": Change(
        "services/mainspring_state/sql/migrations/0001_create_state.sql",
        "-- migrate: rollback",
        "CREATE TABLE state.loose (tenant_id text NOT NULL, PRIMARY KEY (tenant_id));\n"
        "ALTER TABLE state.loose ENABLE ROW LEVEL SECURITY;\n"
        "CREATE POLICY own ON state.loose USING (true);\n-- migrate: rollback",
        "check-tidy",
        "state.loose: lacks FORCE ROW LEVEL SECURITY",
    ),
}


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The repository as it stands, with the same virtual environment."""
    folder = tmp_path_factory.mktemp("check") / "mainspring"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    (folder / ".venv").symlink_to(ROOT / ".venv")
    yield folder
    shutil.rmtree(folder)


def make(folder: Path, *arguments: str) -> tuple[int, str]:
    """Runs make in the copy, which imports its own code; returns the exit code and all that was said."""
    path = os.pathsep.join(str(folder / source) for source in SOURCES)
    done = subprocess.run(
        ["make", "--old-file=.venv/.ready", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "MAKEFLAGS": "", "PYTEST_ADDOPTS": "", "COLUMNS": "400"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=MAKE_SECONDS,
    )
    return done.returncode, done.stdout


def test_the_check_passes_as_it_is(copied: Path) -> None:
    code, told = make(copied, "check")
    assert code == 0, told
    assert "check: all good\n" in told


@pytest.mark.parametrize("name", CHANGES)
def test_the_check_fails_on(name: str, copied: Path) -> None:
    change = CHANGES[name]
    file = copied / change.path
    before = file.read_text()
    assert before.count(change.old) == 1
    file.write_text(before.replace(change.old, change.new))
    try:
        code, told = make(copied, change.target)
    finally:
        file.write_text(before)
    assert code != 0
    assert change.told in told, told
    _, steps = make(copied, "--dry-run", "check")
    assert change.target in steps
