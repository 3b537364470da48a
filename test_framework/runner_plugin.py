"""The pytest half of tests/unified_test_runner.py: selects tests by node id and writes down how each one ended."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

# One marker each; the first seven are also the folders of tests/.
CATEGORIES: Mapping[str, str] = {
    "unit": "pure, no I/O",
    "contract": "one real service over a real wire",
    "integration": "the whole running stack",
    "flow": "several real processes, killed and restarted",
    "simulation": "many processes over virtual time, from a seed",
    "fuzz": "hostile input, made from a seed",
    "tidy": "the rules of the house",
    "websocket": "the gateway's socket",
    "database": "rows and migrations",
    "security": "identity and isolation",
    "performance": "ratios in one run",
    "e2e": "as a user would",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options that the runner passes on."""
    group = parser.getgroup("unified_test_runner")
    group.addoption("--node-pattern", default="", help="run only tests whose whole node id matches, in any case")
    group.addoption("--report-file", default="", help="write how each test ended to this file, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Writes the report in the process that sees all of it: not in a worker of pytest-xdist."""
    path = config.getoption("--report-file")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Report(Path(path)), "unified_test_runner_report")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what the pattern does not match."""
    pattern = config.getoption("--node-pattern").lower()
    if not pattern:
        return
    chosen = [item for item in items if fnmatch.fnmatchcase(item.nodeid.lower(), pattern)]
    left_out = [item for item in items if item not in set(chosen)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = chosen


class _Report:
    """Gathers the outcomes: a test is passed only if set-up, call and tear-down all are."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tests: dict[str, dict[str, Any]] = {}  # Any: JSON values
        self._collection_errors: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._collection_errors.append(report.nodeid)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.config.option.collectonly:
            for item in session.items:
                self._tests[item.nodeid] = _entry("collected", {marker.name for marker in item.iter_markers()})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        entry = self._tests.setdefault(report.nodeid, _entry("passed", set(report.keywords)))
        entry["seconds"] += report.duration
        if report.failed or (report.skipped and entry["outcome"] == "passed"):
            entry["outcome"] = "failed" if report.failed else "skipped"

    def pytest_sessionfinish(self) -> None:
        self._path.write_text(
            json.dumps({"tests": self._tests, "collection_errors": self._collection_errors}), encoding="utf-8"
        )


def _entry(outcome: str, markers: set[str]) -> dict[str, Any]:
    return {"outcome": outcome, "seconds": 0.0, "categories": [name for name in CATEGORIES if name in markers]}
