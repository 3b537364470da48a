"""The data folder of a local stack: its lock, secrets, logs, sockets, ready file and the pids it has started."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

from mainspring.embedded.launch import StartError

DEFAULT: Final = Path(".mainspring")

# A unix socket's path has at most 107 bytes on Linux, 103 on macOS; the longest name below is `.s.PGSQL.5432`.
_SOCKET_FOLDER_BYTES_MAX: Final = 85
_LOCK_TRIES: Final = 5
_LOCK_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True)
class Secrets:
    """What signs users' and services' tokens here. The prefix `dev-` makes production refuse them."""

    auth: str
    service: str


class Folder:
    """One data folder. Whoever holds its lock may write in it."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.postgres = self.path / "postgres"
        self.valkey = self.path / "valkey"
        self.logs = self.path / "logs"
        self._sockets = self.path / "run"
        self.ready_file = self.path / "ready.json"

    @contextmanager
    def lock(self, gateway: str) -> Iterator[None]:
        """Holds the folder; StartError names the process and the address of whoever holds it already."""
        self._make()
        with (self.path / "lock").open("a+", encoding="utf-8") as file:
            self._take(file)
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "gateway": gateway}))
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)
                self.ready_file.unlink(missing_ok=True)
                with suppress(OSError):
                    # Only there for a deep folder, and empty once the servers have stopped.
                    self._short_folder().rmdir()

    def is_held(self) -> bool:
        """Whether a stack runs on this folder now."""
        try:
            file = (self.path / "lock").open("r", encoding="utf-8")
        except FileNotFoundError:
            return False
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    def secrets(self) -> Secrets:
        """The folder's secrets, made when first asked for."""
        path = self.path / "secrets.json"
        if not path.exists():
            made = {name: f"dev-{secrets.token_hex(32)}" for name in ("auth_secret", "service_secret")}
            write_whole(path, json.dumps(made))
        return self.known_secrets()

    def known_secrets(self) -> Secrets:
        """The folder's secrets; StartError when no stack ever ran here."""
        path = self.path / "secrets.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return Secrets(found["auth_secret"], found["service_secret"])
        except FileNotFoundError as error:
            raise StartError(f"{path} does not exist: run `mainspring dev` once to make it.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise StartError(
                f"{path} is not usable ({error!r}): remove it, the next `mainspring dev` makes it."
            ) from error

    def sockets(self) -> Path:
        """Where unix sockets go, for the owner's eyes only: here, or where a path is short enough for them."""
        if len(os.fsencode(self._sockets)) <= _SOCKET_FOLDER_BYTES_MAX:
            self._sockets.mkdir(mode=0o700, parents=True, exist_ok=True)
            return self._sockets
        short = self._short_folder()
        short.mkdir(mode=0o700, exist_ok=True)
        if short.is_symlink() or short.stat().st_uid != os.geteuid():
            raise StartError(f"{short} belongs to somebody else: choose a --data-dir with a shorter path.")
        return short

    def log(self, label: str) -> Path:
        """The log file of one process."""
        return self.logs / f"{label}.log"

    def note_pids(self, started: Mapping[int, float]) -> None:
        """Remembers what was started (pid -> when, as the system says it) for who comes after a kill."""
        write_whole(self.path / "pids.json", json.dumps(started))

    def noted_pids(self) -> dict[int, float]:
        """What the last holder has started."""
        try:
            found = json.loads((self.path / "pids.json").read_text(encoding="utf-8"))
            return {int(pid): float(started) for pid, started in found.items()}
        except (FileNotFoundError, ValueError, AttributeError, TypeError):
            return {}

    def read_ready(self) -> dict[str, Any]:
        """The ready file of the stack that runs here; Any: JSON."""
        found: dict[str, Any] = json.loads(self.ready_file.read_text(encoding="utf-8"))
        return found

    def _short_folder(self) -> Path:
        name = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"mainspring-{os.geteuid()}-{name}"

    def _take(self, file: TextIO) -> None:
        for _ in range(_LOCK_TRIES):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                # Perhaps only `is_held`, which lets go at once.
                time.sleep(_LOCK_SECONDS)
        raise StartError(self._held())

    def _make(self) -> None:
        try:
            for folder in (self.path, self.logs, self.valkey):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Secrets and data lie here: they go into nobody's repository.
            (self.path / ".gitignore").write_text("*\n", encoding="utf-8")
        except OSError as error:
            raise StartError(f"The data folder {self.path} can't be made: {error.strerror}. Choose another.") from error

    def _held(self) -> str:
        try:
            holder = json.loads((self.path / "lock").read_text(encoding="utf-8"))
            who = f"by process {holder['pid']}, whose gateway is at {holder['gateway']}"
        except (ValueError, KeyError, TypeError):
            who = "by a process that is just starting or stopping"
        return (
            f"{self.path} is in use {who}. "
            "Use that one, stop it, or start a second stack with another folder: mainspring dev --data-dir D --port 0."
        )


def write_whole(path: Path, text: str) -> None:
    """Writes a file for its owner's eyes that readers see either as it was or as it will be."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    new.replace(path)
