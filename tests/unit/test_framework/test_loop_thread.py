"""A loop in a thread: it answers, keeps open what was opened, and tells what went wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from test_framework.loop_thread import LoopThread


@asynccontextmanager
async def noted(name: str, notes: list[str], *, fail: bool = False) -> AsyncIterator[str]:
    """Notes when it is entered and left, and that both happen in one task."""
    task = asyncio.current_task()
    notes.append(f"+{name}")
    yield name
    assert asyncio.current_task() is task
    notes.append(f"-{name}")
    if fail:
        raise ValueError(f"{name} broke")


def test_what_is_opened_is_left_last_first() -> None:
    notes: list[str] = []
    loop = LoopThread("test-loop")
    assert loop.open(lambda: noted("a", notes)) == "a"
    assert loop.open(lambda: noted("b", notes)) == "b"
    loop.close()
    assert notes == ["+a", "+b", "-b", "-a"]


def test_closing_tells_all_that_went_wrong_and_closes_the_rest() -> None:
    notes: list[str] = []
    loop = LoopThread("test-loop")
    loop.open(lambda: noted("a", notes, fail=True))
    loop.open(lambda: noted("b", notes))
    loop.open(lambda: noted("c", notes, fail=True))
    with pytest.raises(ExceptionGroup) as raised:
        loop.close()
    assert [str(error) for error in raised.value.exceptions] == ["c broke", "a broke"]
    assert notes == ["+a", "+b", "+c", "-c", "-b", "-a"]


def test_an_error_while_opening_is_the_openers() -> None:
    @asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        raise OSError("no room")
        yield

    loop = LoopThread("test-loop")
    with pytest.raises(OSError, match="no room"):
        loop.open(broken)
    loop.close()


def test_a_task_left_behind_is_told() -> None:
    loop = LoopThread("test-loop")

    async def leave() -> None:
        kept.append(asyncio.create_task(asyncio.Event().wait()))

    kept: list[asyncio.Task[bool]] = []
    loop.run(leave())
    with pytest.raises(ExceptionGroup, match="did not end well") as raised:
        loop.close()
    assert "tasks were left behind" in str(raised.value.exceptions[0])
