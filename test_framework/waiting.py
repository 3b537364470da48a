"""Waiting for a condition with a deadline: the only way in which a test lets time pass."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

POLL_SECONDS = 0.02
DEADLINE_SECONDS = 20.0

Seen = TypeVar("Seen")


class DeadlineMissedError(AssertionError):
    """The condition did not come true in time; the message says which one, and what was seen last."""


async def wait_until(
    condition: Callable[[], Awaitable[Seen] | Seen],
    deadline: float = DEADLINE_SECONDS,
    *,
    what: str = "",
    poll_seconds: float = POLL_SECONDS,
) -> Seen:
    """Asks `condition` (plain or async) until it answers something true, and returns that; `deadline` is in seconds."""
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
            await asyncio.wait_for(never.wait(), poll_seconds)
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
