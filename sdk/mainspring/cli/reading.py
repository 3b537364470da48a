"""How commands read values: JSON on the command line, in a file, or on standard input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import typer


def read_json(text: str, *, option: str) -> Any:
    """The JSON value that the text is, or names as @FILE, or - for standard input. Any: JSON."""
    try:
        if text == "-":
            text = sys.stdin.read()
        elif text.startswith("@"):
            text = Path(text[1:]).read_text(encoding="utf-8")
        return json.loads(text)
    except OSError as error:
        raise typer.BadParameter(f"{text[1:]} can't be read: {error.strerror}.", param_hint=option) from error
    except ValueError as error:
        raise typer.BadParameter(f"it is not JSON: {error}.", param_hint=option) from error
