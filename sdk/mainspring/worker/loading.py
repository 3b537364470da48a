"""Finds the tools in the modules that a worker is told to serve; every fault says which module and what to change."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from mainspring.errors import DeclarationError, WorkerError
from mainspring.tool import Declaration, declare, is_tool


def load_tools(modules: Sequence[str]) -> dict[str, Declaration]:
    """The tools of the modules by name; WorkerError when a module or a tool is at fault.

    Modules are dotted names; those in the current directory are found too.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    tools: dict[str, Declaration] = {}
    for name in modules:
        found = 0
        for value in vars(_import(name)).values():
            if not is_tool(value):
                continue
            found += 1
            try:
                declaration = declare(value)
            except DeclarationError as error:
                raise WorkerError(str(error)) from error
            other = tools.setdefault(declaration.name, declaration)
            if other.function is not value:
                raise WorkerError(
                    f"Two tools are called {declaration.name}: one in {other.function.__module__}, one in "
                    f"{value.__module__}. Give one of them another name with @tool(name=…)."
                )
        if not found:
            raise WorkerError(f"The module {name} has no tool: put @tool before a function of it.")
    if not tools:
        raise WorkerError("There is no tool to serve: name a module that has some.")
    return tools


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise WorkerError(
                f"There is no module {name}: give its dotted name (not its file), from the directory that holds it."
            ) from error
        raise WorkerError(f"The module {name} needs {error.name}, which is not installed here.") from error
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise WorkerError(
            f"The module {name} cannot be imported: {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})."
        ) from error
