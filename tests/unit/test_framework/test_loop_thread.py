"""A loop in a thread: it keeps open what was opened, and tells what went wrong."""

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


def test_what_is_opened_is_left_in_the_task_that_opened_it() -> None:
    notes: list[str] = []
    loop = LoopThread("test-loop")
    with loop.opened(lambda: noted("a", notes)) as a, loop.opened(lambda: noted("b", notes)) as b:
        assert (a, b) == ("a", "b")
    loop.close()
    assert notes == ["+a", "+b", "-b", "-a"]


def test_an_error_while_leaving_is_the_blocks() -> None:
    notes: list[str] = []
    loop = LoopThread("test-loop")
    with (
        pytest.raises(ValueError, match="b broke"),
        loop.opened(lambda: noted("a", notes)),
        loop.opened(lambda: noted("b", notes, fail=True)),
    ):
        pass
    loop.close()
    assert notes == ["+a", "+b", "-b", "-a"]


def test_an_error_while_opening_is_the_openers() -> None:
    @asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        raise OSError("no room")
        yield

    loop = LoopThread("test-loop")
    with pytest.raises(OSError, match="no room"), loop.opened(broken):
        pass
    loop.close()


def test_a_task_left_behind_is_told() -> None:
    loop = LoopThread("test-loop")

    async def leave() -> None:
        kept.append(asyncio.create_task(asyncio.Event().wait()))

    kept: list[asyncio.Task[bool]] = []
    loop.run(leave())
    with pytest.raises(AssertionError, match="tasks were left behind"):
        loop.close()
