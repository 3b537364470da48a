"""Waiting for a condition with a deadline: the only way in which a test lets time pass."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, overload

POLL_SECONDS = 0.02
DEADLINE_SECONDS = 20.0

Seen = TypeVar("Seen")


class DeadlineMissedError(AssertionError):
    """The condition did not come true in time; the message says which one, and what was seen last."""


@overload
async def wait_until(
    condition: Callable[[], Coroutine[Any, Any, Seen]], deadline: float = ..., *, what: str = ...
) -> Seen: ...


@overload
async def wait_until(condition: Callable[[], Seen], deadline: float = ..., *, what: str = ...) -> Seen: ...


async def wait_until(condition: Callable[[], Any], deadline: float = DEADLINE_SECONDS, *, what: str = "") -> Any:
    """Asks `condition` (plain or async) until it answers something true, and returns that; `deadline` is in seconds.

    Any: only the overloads know whether the condition has to be awaited.
    """
    end = time.monotonic() + deadline
    never = asyncio.Event()
    while True:
        answer = condition()
        seen = await answer if inspect.isawaitable(answer) else answer
        if seen:
            return seen
        if time.monotonic() >= end:
            raise DeadlineMissedError(f"{what or _name(condition)} did not come true in {deadline} s; last: {seen!r}")
        try:
            await asyncio.wait_for(never.wait(), POLL_SECONDS)
        except TimeoutError:
            continue


def wait_until_blocking(condition: Callable[[], Seen], deadline: float = DEADLINE_SECONDS, *, what: str = "") -> Seen:
    """`wait_until` for set-up code that runs outside any loop."""
    end = time.monotonic() + deadline
    never = threading.Event()
    while True:
        seen = condition()
        if seen:
            return seen
        if time.monotonic() >= end:
            raise DeadlineMissedError(f"{what or _name(condition)} did not come true in {deadline} s; last: {seen!r}")
        never.wait(POLL_SECONDS)


def _name(condition: Callable[..., object]) -> str:
    return getattr(condition, "__qualname__", repr(condition))
