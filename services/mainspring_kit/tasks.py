"""Tasks that have an owner: a task group that ends with the block it was opened for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager


class _EndedError(Exception):
    """The block is over: cancels what still runs in its group."""


def raise_if_cancelled() -> None:
    """Raises the cancel of this task that a broken call may have hidden; for loops that call again.

    A cancel that meets a grpc.aio call in the moment it fails comes out as the call's status, not as CancelledError.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


@asynccontextmanager
async def background(*coroutines: Coroutine[object, object, object]) -> AsyncIterator[asyncio.TaskGroup]:
    """Runs the coroutines, and whatever is started in the yielded group, beside the block; cancels them at its end.

    When one of them fails, the block is cancelled and the failure raised, as a task group does.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            for coroutine in coroutines:
                tasks.create_task(coroutine)
            yield tasks
            raise _EndedError
    except* _EndedError:
        pass
