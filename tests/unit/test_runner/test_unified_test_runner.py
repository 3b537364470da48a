"""The runner, run as a user runs it, over small suites written for the occasion."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from test_framework.runner_plugin import CATEGORIES
from tests import unified_test_runner as runner

ROOT = Path(__file__).parents[3]
RUN_SECONDS = 60

INI = """
[pytest]
markers = {markers}
addopts = --strict-markers -p no:cacheprovider
"""
SUITE = """
import pytest

@pytest.mark.unit
def test_agent_sums(): assert 1 + 1 == 2

@pytest.mark.unit
@pytest.mark.websocket
def test_other_sums(): assert 1 + 2 == 3

@pytest.mark.integration
class TestAgentThings:
    def test_good(self): assert 1 + 3 == 4
    def test_bad(self): assert 1 == 2, "as it must be"
"""
SECOND = """
import os, pytest

@pytest.mark.contract
def test_sees_docker_forbidden(): assert os.environ.get("MAINSPRING_TEST_NO_DOCKER") == "1"
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a runner of its own and two files of tests, one of which fails."""
    markers = "\n    ".join(f"{name}: {meaning}" for name, meaning in CATEGORIES.items())
    (tmp_path / "pytest.ini").write_text(INI.format(markers=f"\n    {markers}"))
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests/unified_test_runner.py", tmp_path / "tests")
    (tmp_path / "tests/test_first.py").write_text(SUITE)
    (tmp_path / "tests/test_second.py").write_text(SECOND)
    return tmp_path


def run(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the repository's runner with this Python."""
    # Only the plugins that the suites need, since each run loads them anew.
    plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist.plugin"}
    environment = {**os.environ, **plugins, "PYTHONPATH": str(ROOT)}
    environment.pop(runner.NO_DOCKER, None)
    return subprocess.run(
        [sys.executable, str(repository / "tests/unified_test_runner.py"), *arguments],
        cwd=repository.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
    )


def test_a_failure_is_the_exit_code_and_the_counts_are_told_per_file(repository: Path) -> None:
    done = run(repository)
    assert done.returncode == 1
    assert "    4  tests/test_first.py  (1 failed, 3 passed)" in done.stdout
    assert "    1  tests/test_second.py  (1 failed)" in done.stdout
    assert "    5  in all  (2 failed, 3 passed)" in done.stdout


def test_a_category_and_a_pattern_on_the_whole_node_id_select(repository: Path) -> None:
    done = run(repository, "--category", "unit", "--pattern", "*FIRST*Agent*", "--json-output", str(repository / "out"))
    assert done.returncode == 0, done.stdout
    document = json.loads((repository / "out").read_text())
    assert [test["node_id"] for test in document["tests"]] == ["tests/test_first.py::test_agent_sums"]
    assert document["counts"] == {"passed": 1}
    assert document["exit_code"] == 0
    assert document["yardstick_seconds"] > 0.0


def test_the_pattern_matches_the_class_and_the_folder_too(repository: Path) -> None:
    done = run(repository, "--pattern", "tests/*TestAgentThings*", "--list")
    assert done.returncode == 0
    assert done.stdout.splitlines()[:2] == [
        "tests/test_first.py::TestAgentThings::test_good",
        "tests/test_first.py::TestAgentThings::test_bad",
    ]
    assert "    2  tests/test_first.py  (2 collected)" in done.stdout


def test_several_categories_are_united(repository: Path) -> None:
    done = run(repository, "--category", "websocket", "--category", "contract", "--no-docker")
    assert done.returncode == 0, done.stdout
    assert "    2  in all  (2 passed)" in done.stdout


@pytest.mark.parametrize("arguments", [("--pattern", "*nothing-like-this*"), ("--category", "e2e")])
def test_no_test_at_all_is_a_failure(repository: Path, arguments: tuple[str, ...]) -> None:
    done = run(repository, *arguments)
    assert done.returncode == runner.EXIT_NO_TESTS
    assert "No test was found." in done.stderr
    assert run(repository, *arguments, "--list").returncode == runner.EXIT_NO_TESTS


def test_a_file_that_can_not_be_imported_is_a_failure(repository: Path) -> None:
    (repository / "tests/test_broken.py").write_text("import there_is_no_such_module")
    assert run(repository, "--category", "unit").returncode not in (0, runner.EXIT_NO_TESTS)


def test_a_category_with_a_folder_of_its_own_imports_nothing_else(repository: Path) -> None:
    (repository / "tests/test_broken.py").write_text("import there_is_no_such_module")
    (repository / "tests/tidy").mkdir()
    (repository / "tests/tidy/test_third.py").write_text("import pytest\n@pytest.mark.tidy\ndef test_a(): pass")
    done = run(repository, "--category", "tidy")
    assert done.returncode == 0, done.stdout
    assert "    1  in all  (1 passed)" in done.stdout


def test_fast_fail_stops_at_the_first_failure(repository: Path) -> None:
    done = run(repository, "--fast-fail")
    assert done.returncode == 1
    assert "in all  (1 failed, 3 passed)" in done.stdout


def test_workers_report_to_one_place(repository: Path) -> None:
    done = run(repository, "--workers", "2", "--pattern", "*agent*")
    assert done.returncode == 1
    assert "    3  in all  (1 failed, 2 passed)" in done.stdout


def test_an_unknown_category_is_refused(repository: Path) -> None:
    done = run(repository, "--category", "smoke")
    assert done.returncode == 2
    assert "invalid choice: 'smoke'" in done.stderr


def test_the_categories_are_listed(repository: Path) -> None:
    done = run(repository, "--list-categories")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(CATEGORIES)


def test_the_runner_knows_the_plugins_categories() -> None:
    assert dict(runner.CATEGORIES) == CATEGORIES


def test_it_goes_on_in_the_repositorys_environment(repository: Path) -> None:
    python = repository / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "went on with: $@"\n')
    python.chmod(0o755)
    done = run(repository, "--list")
    assert done.stdout == f"went on with: {repository}/tests/unified_test_runner.py --list\n"


def _tests(seconds: float) -> dict[str, runner.Report]:
    return {
        str(number): {"outcome": "passed", "seconds": seconds * number, "categories": ["unit"]}
        for number in range(1, 21)
    }


def test_times_are_summed_up_by_category() -> None:
    failed = {"f": {"outcome": "failed", "seconds": 99.0, "categories": ["unit"]}}
    assert runner.summarize({**_tests(0.1), **failed}) == {
        "unit": {"tests": 20, "median_seconds": 1.05, "p95_seconds": 2.0}
    }


def test_a_baseline_warns_over_twice_its_times_and_never_fails(tmp_path: Path) -> None:
    path = tmp_path / "data" / "baselines.json"
    fast, slow = runner.summarize(_tests(0.1)), runner.summarize(_tests(1.0))
    assert runner.keep_baseline("compare", fast, path) == []
    assert runner.keep_baseline("write", fast, path) == []
    assert runner.keep_baseline("compare", fast, path) == []
    warnings = runner.keep_baseline("compare", slow, path)
    assert [warning.split(" is ")[0] for warning in warnings] == ["unit: median_seconds", "unit: p95_seconds"]


def test_a_baseline_keeps_the_categories_that_did_not_run(tmp_path: Path) -> None:
    path = tmp_path / "baselines.json"
    runner.keep_baseline("write", runner.summarize(_tests(0.1)), path)
    contract = {"c": {"outcome": "passed", "seconds": 1.0, "categories": ["contract"]}}
    runner.keep_baseline("write", runner.summarize(contract), path)
    assert sorted(json.loads(path.read_text())["categories"]) == ["contract", "unit"]


def test_a_part_of_a_category_is_neither_compared_nor_kept(repository: Path) -> None:
    kept = {"yardstick_seconds": 0.01, "categories": {"unit": {"tests": 9, "median_seconds": 0.1, "p95_seconds": 0.1}}}
    part = {"yardstick_seconds": 0.01, "categories": {"unit": {"tests": 8, "median_seconds": 9.0, "p95_seconds": 9.0}}}
    assert runner.compare(kept, part) == []
    refused = run(repository, "--baseline", "write", "--pattern", "*agent*")
    assert refused.returncode == 2 and "needs whole categories" in refused.stderr


def test_only_the_categories_asked_for_are_kept(repository: Path) -> None:
    run(repository, "--category", "unit", "--baseline", "write")
    kept = json.loads((repository / "tests/data/baselines.json").read_text())
    assert list(kept["categories"]) == ["unit"]


def test_a_slower_machine_is_no_regression() -> None:
    times = {"unit": {"tests": 1, "median_seconds": 1.0, "p95_seconds": 1.0}}
    slow = {"unit": {"tests": 1, "median_seconds": 2.5, "p95_seconds": 2.5}}
    kept = {"yardstick_seconds": 0.01, "categories": times}
    assert len(runner.compare(kept, {"yardstick_seconds": 0.01, "categories": slow})) == 2
    assert runner.compare(kept, {"yardstick_seconds": 0.02, "categories": slow}) == []
