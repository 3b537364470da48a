"""`mainspring dev` as somebody at a terminal has it: its output, its ready file, and other commands beside it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from test_framework.waiting import wait_until_blocking
from tests.flow.supervising import lives

MAINSPRING = (sys.executable, "-m", "mainspring")
START_SECONDS = 60.0


class DevCommand:
    """One running `mainspring dev`."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.ready_file = folder / "ready.json"
        self.ready_file.unlink(missing_ok=True)
        self._output = folder / "dev.out"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [*MAINSPRING, "dev", "--data-dir", self.data_dir, "--ready-file", self.ready_file, *options],
                stdout=output,
                stderr=output,
                env=environment(),
                cwd=folder,
            )

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._output.read_text()

    def ready(self) -> dict[str, Any]:
        """The ready file, once it is there. Any: JSON."""
        wait_until_blocking(
            lambda: self.ready_file.exists() or self.process.poll() is not None, START_SECONDS, what="the ready file"
        )
        assert self.process.poll() is None, self.output
        found: dict[str, Any] = json.loads(self.ready_file.read_text())
        return found

    def pids(self) -> list[int]:
        """All processes that the ready file names."""
        return [pid for pids in self.ready()["pids"].values() for pid in pids]

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Stops it and returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(30)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Another command against it."""
        return mainspring(*command, "--data-dir", str(self.data_dir), cwd=self.folder)


def mainspring(*command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """One command to its end."""
    return subprocess.run(
        [*MAINSPRING, *command],
        capture_output=True,
        text=True,
        timeout=60,
        env={**environment(), **variables},
        cwd=cwd,
        check=False,
    )


def environment() -> dict[str, str]:
    """The environment without what would lead a command to another platform or to other servers."""
    foreign = ("MAINSPRING_", "DATABASE_URL", "REDIS_URL", "COLUMNS")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


@contextmanager
def running_dev(folder: Path, *options: str) -> Iterator[DevCommand]:
    """A `mainspring dev` that serves; at the end it is killed where it still runs, and nothing of it may be left."""
    command = DevCommand(folder, *options)
    try:
        pids = command.pids()
        yield command
    finally:
        if command.process.poll() is None:
            command.stop(signal.SIGTERM)
    wait_until_blocking(lambda: not any(map(lives, pids)), 10, what="an end of all processes")


def json_lines(text: str) -> Sequence[dict[str, Any]]:
    """JSON lines as objects. Any: JSON."""
    return [json.loads(line) for line in text.splitlines()]
