"""The rules of the whole suite: asyncio debug is on, an error that a loop could tell nobody fails the test."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from test_framework.fixtures.real_services import private_stack, real_services_fixture

__all__ = ["private_stack", "real_services_fixture"]

TESTS = Path(__file__).parent
FOLDERS_THAT_ARE_CATEGORIES = {"unit", "contract", "integration", "flow", "tidy", "simulation", "fuzz"}

# grpc.aio wakes every loop of the process for the events of any (grpc/grpc#23377); one that finds none says so.
_GRPC_POLLER = "PollerCompletionQueue"


class _LoopErrors(logging.Handler):
    """Keeps what loops report through their exception handlers: tasks and callbacks whose error nobody read."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        lines = record.getMessage().splitlines()
        error = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
        # Debug mode adds where the object was made, from pytest's first line on; its end says enough.
        text = "\n".join([*lines[:2], *lines[2:][-6:], error])
        if _GRPC_POLLER not in text:
            self.seen.append(text)


_loop_errors = _LoopErrors()


def pytest_configure(config: pytest.Config) -> None:
    """Turns asyncio's debug mode on for the tests' loops (not for child processes)."""
    config.option.asyncio_debug = True
    logging.getLogger("asyncio").addHandler(_loop_errors)


def pytest_unconfigure() -> None:
    """Takes back what pytest_configure did."""
    logging.getLogger("asyncio").removeHandler(_loop_errors)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks each test with its folder's category, before `-m` looks at the markers."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in FOLDERS_THAT_ARE_CATEGORIES:
            item.add_marker(folder)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Fails the test in whose time a loop had an error that nobody awaited."""
    yield
    if asyncio.iscoroutinefunction(getattr(item, "obj", None)):
        gc.collect()  # a task's unread error is reported when the task is collected
    seen, _loop_errors.seen = _loop_errors.seen, []
    if seen:
        pytest.fail("a loop reported errors that nobody awaited:\n" + "\n".join(seen), pytrace=False)
