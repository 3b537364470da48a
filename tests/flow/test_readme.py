"""The README, done as it says: its tool, its agent and its commands, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from test_framework.waiting import wait_until_blocking

pytestmark = pytest.mark.e2e

README: Final = Path(__file__).parents[2] / "README.md"
BLOCK: Final = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
# Of the test run itself, not of a newcomer.
NOT_INHERITED: Final = ("DATABASE_URL", "REDIS_URL", "MAINSPRING_URL", "MAINSPRING_TOKEN", "PYTHONPATH")
EVENTS: Final = [
    "agent_started",
    "agent_thinking",
    "tool_executing",
    "tool_completed",
    "agent_thinking",
    "agent_completed",
]


def block(language: str) -> str:
    """The only block of the README in this language."""
    (found,) = (match["text"] for match in BLOCK.finditer(README.read_text()) if match["language"] == language)
    return found


class Newcomer:
    """Somebody with an empty folder and the command `mainspring`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "mainspring", *arguments]

    def does(self, *arguments: str) -> str:
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def newcomer(tmp_path: Path) -> Iterator[Newcomer]:
    """A newcomer for whom `mainspring dev shop` runs."""
    (tmp_path / "shop.py").write_text(block("python"))
    (tmp_path / "clerk.yaml").write_text(block("yaml"))
    somebody = Newcomer(tmp_path)
    with (
        (tmp_path / "dev.log").open("wb") as log,
        subprocess.Popen(
            somebody.command("dev", "shop", "--port", "0"),
            cwd=tmp_path,
            env=somebody.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            ready = tmp_path / ".mainspring/ready.json"
            wait_until_blocking(lambda: ready.exists() or process.poll() is not None, 60, what="the platform is ready")
            assert process.poll() is None, (tmp_path / "dev.log").read_text()
            yield somebody
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0, (tmp_path / "dev.log").read_text()
        finally:
            process.kill()


def test_the_quickstart_does_what_it_says(newcomer: Newcomer) -> None:
    assert "clerk" in newcomer.does("apply", "-f", "clerk.yaml")
    lines = newcomer.does("run", "clerk", "--input", '{"article": "tea"}', "--json").splitlines()
    frames = [json.loads(line) for line in lines]
    assert [frame["type"] for frame in frames] == EVENTS
    assert [frame["seq"] for frame in frames] == list(range(1, 7))
    assert frames[-1]["data"]["result"] == {"pieces": 12}
    again = newcomer.does("runs", "events", frames[0]["run_id"], "--json").splitlines()
    assert [json.loads(line) for line in again] == frames
