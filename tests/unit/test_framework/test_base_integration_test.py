"""The base class's promises, shown on suites that pytest runs in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
RUN_SECONDS = 60

HEAD = """
from test_framework.base_integration_test import BaseIntegrationTest

def say(word): print(f"\\n~{word}")

class TestAgentHooks(BaseIntegrationTest):
"""


def run(folder: Path, body: str) -> tuple[int, str, list[str]]:
    """Runs the body of a test class; returns the exit code, the output and the lines that the tests printed."""
    path = folder / "test_suite.py"
    path.write_text(HEAD + body)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-s", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder), str(path)],
        cwd=ROOT,
        # Only the plugins that the suites need, since each run loads them anew.
        env={
            **os.environ,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_PLUGINS": "pytest_asyncio.plugin,pytest_timeout",
        },
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
    )
    return done.returncode, done.stdout, [line[1:] for line in done.stdout.splitlines() if line.startswith("~")]


def test_hooks_and_clean_ups_run_in_their_order(tmp_path: Path) -> None:
    code, output, said = run(
        tmp_path,
        """
    async def async_setup(self):
        say("set-up")
        self.add_cleanup(lambda: say("first"))
        self.add_cleanup(self.second)
    async def second(self): say("second")
    async def async_teardown(self): say("tear-down")
    async def test_something(self):
        self.add_cleanup(lambda: say("third"))
        say("test")
""",
    )
    assert code == 0, output
    assert said == ["set-up", "test", "tear-down", "third", "second", "first"]


def test_each_failing_clean_up_is_reported_and_the_rest_runs(tmp_path: Path) -> None:
    code, output, said = run(
        tmp_path,
        """
    async def async_teardown(self): raise ValueError("tear-down broke")
    async def test_something(self):
        self.add_cleanup(lambda: say("ran"))
        self.add_cleanup(self.broken)
    async def broken(self): raise RuntimeError("clean-up broke")
""",
    )
    assert code == 1
    assert said == ["ran"]
    assert "1 passed, 1 error" in output
    assert "ValueError: tear-down broke" in output and "RuntimeError: clean-up broke" in output


def test_clean_ups_run_after_a_set_up_that_failed(tmp_path: Path) -> None:
    code, output, said = run(
        tmp_path,
        """
    async def async_setup(self):
        self.add_cleanup(lambda: say("ran"))
        raise RuntimeError("set-up broke")
    async def test_something(self): say("never")
""",
    )
    assert code == 1
    assert said == ["ran"]
    assert "RuntimeError: set-up broke" in output


def test_each_test_has_clean_ups_of_its_own(tmp_path: Path) -> None:
    code, output, said = run(
        tmp_path,
        """
    async def test_one(self): self.add_cleanup(lambda: say("one"))
    async def test_two(self): say("two")
""",
    )
    assert code == 0, output
    assert said == ["one", "two"]
