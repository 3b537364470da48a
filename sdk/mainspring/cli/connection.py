"""Which platform a command talks to: the one in the environment, else the `mainspring dev` that runs here."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from mainspring.client import Client
from mainspring.embedded.launch import StartError

DATA_DIR: Final = Path(".mainspring")

DataDir = Annotated[
    Path, typer.Option("--data-dir", metavar="D", help="The data folder of the `mainspring dev` to use or to start.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def connect(data_dir: Path = DATA_DIR) -> Client:
    """A client of the platform."""
    url, token = find(data_dir)
    return Client(url, token)


def find(data_dir: Path) -> tuple[str, str]:
    """The gateway's URL and a token."""
    url, token = os.environ.get("MAINSPRING_URL", ""), os.environ.get("MAINSPRING_TOKEN", "")
    if url and token:
        return url, token
    from mainspring.dev.folder import Folder  # only where the environment says nothing

    folder = Folder(data_dir)
    if not folder.is_held() or not folder.ready_file.exists():
        missing = " and ".join(
            name for name, value in (("MAINSPRING_URL", url), ("MAINSPRING_TOKEN", token)) if not value
        )
        raise StartError(
            f"No platform to talk to: {missing} not set, and no `mainspring dev` serves in {folder.path}. "
            "Start one in another terminal with: mainspring dev"
        )
    ready = folder.read_ready()
    sys.stderr.write(f"(the mainspring dev in {data_dir}, {ready['gateway']})\n")
    return url or ready["gateway"], token or ready["token"]
