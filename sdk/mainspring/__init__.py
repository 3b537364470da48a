"""Mainspring's SDK: declare tools, run workers, start and follow runs. Loads only what is used."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from mainspring.client import ApiError as ApiError
    from mainspring.client import Client as Client
    from mainspring.client import Delta as Delta
    from mainspring.client import Event as Event
    from mainspring.client import GatewayUnreachableError as GatewayUnreachableError
    from mainspring.client import Started as Started
    from mainspring.errors import ToolError as ToolError
    from mainspring.tool import ToolContext as ToolContext
    from mainspring.tool import tool as tool

_HOMES: Final = {
    "ApiError": "mainspring.client",
    "Client": "mainspring.client",
    "Delta": "mainspring.client",
    "Event": "mainspring.client",
    "GatewayUnreachableError": "mainspring.client",
    "Started": "mainspring.client",
    "ToolContext": "mainspring.tool",
    "ToolError": "mainspring.errors",
}

__all__ = [
    "ApiError",
    "Client",
    "Delta",
    "Event",
    "GatewayUnreachableError",
    "Started",
    "ToolContext",
    "ToolError",
    "tool",
]


class _Package(ModuleType):
    """`mainspring.tool` is the decorator, also after somebody has imported the module of that name."""

    @property
    def tool(self) -> Any:  # Any: the decorator's own type is what checkers see above
        return importlib.import_module("mainspring.tool").tool

    @tool.setter
    def tool(self, module: ModuleType) -> None:
        """What the import system sets stays out of sight; `from mainspring.tool import …` does not need it."""


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
