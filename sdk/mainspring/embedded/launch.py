"""How a process of a local stack is started, found ready and stopped: values that the supervisor carries out."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


class StartError(Exception):
    """A local stack can't start. The message says what, which one and what to do next; it needs no traceback."""


def _nothing() -> None:
    """What there is to do before most starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One process to run. `ready` gets the pid and returns once that process serves; `before` precedes each start."""

    name: str
    argv: tuple[str, ...]
    log: Path
    ready: Callable[[int], Awaitable[None]]
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    index: int = 0
    replicas: int = 1
    # It stops by itself when the pipe MAINSPRING_PARENT_FD ends.
    watches_parent: bool = False
    before: Callable[[], None] = _nothing
    stop_signal: signal.Signals = signal.SIGTERM
    # What still ends it when the stop signal does not.
    hard_stop_signal: signal.Signals = signal.SIGKILL

    @property
    def label(self) -> str:
        """`state`, or `state.1` for the second of several."""
        return self.name if self.replicas == 1 else f"{self.name}.{self.index}"


def wheel_folder(package: str, what: str) -> Path:
    """Where an installed package lies, without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise StartError(
            f"{what} is not installed: the package {package} is missing. "
            f"Install it with: pip install 'mainspring[dev]', or say where your own server is."
        )
    return Path(found.submodule_search_locations[0])
