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


def cancel(request_id: str) -> state_pb2.RunInput:
    return state_pb2.RunInput(request_id=request_id, cancel=state_pb2.CancelInput())


@pytest.mark.parametrize("interrupt", ["hear", "expire", "abandon", "alarm"])
async def test_an_interrupt_ends_a_wait_and_a_thought(interrupt: str) -> None:
    waits: list[Callable[[Attention], Coroutine[Any, Any, Any]]] = [  # Any: each waits for something else
        lambda attention: attention.wait(),
        lambda attention: attention.listen(forever()),
        lambda attention: attention.pause(60),
    ]
    for waiting in waits:
        attention = Attention()
        arguments = [cancel("r")] if interrupt == "hear" else []
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
    attention.hear(cancel("r"))
    assert not attention.is_interrupted
    attention.alarm()
    assert attention.is_interrupted


async def test_the_first_cancel_is_the_one_that_counts() -> None:
    attention = Attention()
    attention.hear(cancel("first"))
    attention.hear(cancel("second"))
    assert attention.cancel_input is not None
    assert attention.cancel_input.request_id == "first"


async def test_other_inputs_wake_and_interrupt_nothing() -> None:
    attention = Attention()
    signal = state_pb2.RunInput(request_id="r", signal=state_pb2.SignalInput(name="go"))
    asyncio.get_running_loop().call_soon(attention.hear, signal)
    async with asyncio.timeout(1):
        await attention.pause(60)
    assert not attention.is_interrupted
    assert attention.inputs == [signal]
    assert await attention.listen(asyncio.sleep(0, "thought")) == "thought"


async def test_an_input_is_heard_once_until_what_was_taken_may_be_lost() -> None:
    attention = Attention()
    signal = state_pb2.RunInput(request_id="r", signal=state_pb2.SignalInput(name="go"))
    attention.hear(signal)
    attention.hear(signal)
    assert len(attention.inputs) == 1
    attention.inputs = []
    attention.hear(signal)
    assert not attention.inputs
    attention.hear_again()
    attention.hear(signal)
    assert attention.inputs == [signal]
