"""Keys of model providers: found by name when they are used, and known to nothing else, no event and no log."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from mainspring_kit.errors import MainspringError, Reason

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_FOLDER: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._@-]{0,127}")
_KEY_BYTES_MAX: Final = 16_384


class Credentials:
    """Looks in `<folder>/<tenant>/<name>`, `<folder>/<name>`, `MAINSPRING_CREDENTIAL_<NAME>`, `<NAME>_API_KEY`."""

    def __init__(self, folder: Path | None, environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._environment = environment

    def find(self, name: str, *, tenant_id: str) -> str:
        """The key, as it is now: files may be exchanged at any time. Empty: there is none."""
        if not _NAME.fullmatch(name):
            return ""
        folders = [] if self._folder is None else [self._folder]
        if self._folder is not None and _FOLDER.fullmatch(tenant_id):
            folders.insert(0, self._folder / tenant_id)
        for folder in folders:
            if key := _read(folder / name):
                return key
        variable = name.upper().replace("-", "_")
        known = self._environment.get(f"MAINSPRING_CREDENTIAL_{variable}")
        if not known and name in ("openai", "anthropic"):
            known = self._environment.get(f"{variable}_API_KEY")
        return (known or "").strip()

    def missing(self, name: str) -> MainspringError:
        """The error for a key that is not there."""
        mounted = f"mount the file {name} in MAINSPRING_CREDENTIALS_DIR, or " if self._folder else ""
        variable = f"MAINSPRING_CREDENTIAL_{name.upper().replace('-', '_')}"
        return MainspringError(
            Reason.CREDENTIAL_MISSING,
            f"There is no credential {name!r} here: {mounted}set {variable} for the execution service.",
            credential=name,
        )


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_KEY_BYTES_MAX).decode().strip()
    except (OSError, UnicodeDecodeError):
        return ""
