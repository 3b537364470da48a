"""Tools' names as providers' wires take them: no dots, and on one of them no more than 64 characters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

WIRE_NAME_CHARACTERS_MAX: Final = 64
_HASH_CHARACTERS: Final = 8


def wire_name(tool: str) -> str:
    """`diagnostics.echo` as `diagnostics__echo`; names have no two separators in a row, so none falls on another."""
    name = tool.replace(".", "__")
    if len(name) <= WIRE_NAME_CHARACTERS_MAX:
        return name
    digest = hashlib.sha256(tool.encode()).hexdigest()[:_HASH_CHARACTERS]
    return f"{name[: WIRE_NAME_CHARACTERS_MAX - _HASH_CHARACTERS - 1]}_{digest}"


def tool_named(name: str, tools: Iterable[str]) -> str:
    """The tool that a model means; for a name that was not offered the nearest reading, which the run then refuses."""
    return next((tool for tool in tools if wire_name(tool) == name), name[:128].replace("__", "."))
