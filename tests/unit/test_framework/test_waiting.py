"""Waiting ends with the condition, or loudly with the deadline."""

from __future__ import annotations

import asyncio
import time

import pytest

from test_framework.waiting import DeadlineMissedError, wait_until, wait_until_blocking


async def test_it_returns_what_the_condition_answers() -> None:
    answers = iter(["", "", "there"])
    assert await wait_until(lambda: next(answers), 5.0) == "there"


async def test_an_async_condition_is_awaited() -> None:
    happened = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, happened.set)

    async def has_happened() -> bool:
        return happened.is_set()

    assert await wait_until(has_happened, 5.0)


async def test_a_missed_deadline_says_what_was_waited_for() -> None:
    start = time.monotonic()
    with pytest.raises(DeadlineMissedError, match=r"the end of time did not come true in 0\.1 s; last: 0"):
        await wait_until(lambda: 0, 0.1, what="the end of time")
    assert 0.1 <= time.monotonic() - start < 5.0


async def test_a_condition_that_fails_is_not_waited_for() -> None:
    with pytest.raises(ZeroDivisionError):
        await wait_until(lambda: 1 // 0, 5.0)


def test_outside_a_loop_it_is_the_same() -> None:
    answers = iter([0, 0, 3])
    assert wait_until_blocking(lambda: next(answers), 5.0) == 3
    with pytest.raises(DeadlineMissedError):
        wait_until_blocking(lambda: False, 0.05)
