"""A wait ends with what comes first; an interrupt reaches a model in mid-thought and nobody else's cancel is eaten."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from mainspring.v1 import state_pb2
from mainspring_execution.engine.attention import Attention

pytestmark = pytest.mark.unit


async def forever() -> str:
    await asyncio.Event().wait()
    return "never"


async def test_a_wait_ends_with_any_of_its_futures() -> None:
    attention, loop = Attention(), asyncio.get_running_loop()
    first, second = loop.create_future(), loop.create_future()
    loop.call_soon(second.set_result, 1)
    async with asyncio.timeout(1):
        await attention.wait([first, second])
    assert not first.done()
    first.cancel()


async def test_a_wait_for_what_is_done_already_ends_at_once() -> None:
    attention, loop = Attention(), asyncio.get_running_loop()
    first, second = loop.create_future(), loop.create_future()
    first.set_result(1)
    async with asyncio.timeout(1):
        await attention.wait([first])
        await attention.wait([second, first])
    second.cancel()


@pytest.mark.parametrize("interrupt", ["cancel", "expire", "abandon", "alarm"])
async def test_an_interrupt_ends_a_wait_and_a_thought(interrupt: str) -> None:
    waits: list[Callable[[Attention], Coroutine[Any, Any, Any]]] = [  # Any: each waits for something else
        lambda attention: attention.wait(),
        lambda attention: attention.listen(forever()),
        lambda attention: attention.pause(60),
    ]
    for waiting in waits:
        attention = Attention()
        arguments = [state_pb2.RunInput(request_id="r")] if interrupt == "cancel" else []
        asyncio.get_running_loop().call_soon(getattr(attention, interrupt), *arguments)
        async with asyncio.timeout(1):
            assert await waiting(attention) is None
        assert attention.is_interrupted
        assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]  # a test runs in a task


async def test_what_is_interrupted_already_is_not_begun() -> None:
    attention = Attention()
    attention.expire()
    assert await attention.listen(forever()) is None
    await attention.wait()


async def test_a_cancel_of_the_task_itself_goes_through() -> None:
    attention = Attention()
    ready = asyncio.Event()

    async def drive() -> None:
        ready.set()
        await attention.listen(forever())

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(drive())
        await ready.wait()
        task.cancel()
        attention.expire()
    assert task.cancelled()


async def test_an_end_on_its_way_is_not_interrupted_by_cancel_or_deadline() -> None:
    attention = Attention()
    attention.is_ending = True
    attention.expire()
    attention.cancel(state_pb2.RunInput(request_id="r"))
    assert not attention.is_interrupted
    attention.alarm()
    assert attention.is_interrupted


async def test_the_first_cancel_is_the_one_that_counts() -> None:
    attention = Attention()
    attention.cancel(state_pb2.RunInput(request_id="first"))
    attention.cancel(state_pb2.RunInput(request_id="second"))
    assert attention.cancel_input is not None
    assert attention.cancel_input.request_id == "first"
