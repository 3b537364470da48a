"""An event loop in a thread of its own, for synchronous tests. Owns the loop and what runs on it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, TypeVar

WAIT_SECONDS = 60.0

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for a synchronous caller."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_debug(True)
        self._thread = threading.Thread(target=self._turn, name=name)
        self._thread.start()

    def _turn(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    # Any: what a coroutine yields and is sent is the loop's own affair.
    def run(self, coroutine: Coroutine[Any, Any, T], timeout_seconds: float = WAIT_SECONDS) -> T:
        """Runs a coroutine on the loop and waits for its answer."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_seconds)

    @contextmanager
    def opened(self, make: Callable[[], AbstractAsyncContextManager[T]]) -> Iterator[T]:
        """Holds an async context manager open on the loop while the block runs; entered and left in one task."""
        stop = asyncio.Event()
        opened: Future[T] = Future()

        async def hold() -> None:
            try:
                async with make() as value:
                    opened.set_result(value)
                    await stop.wait()
            except BaseException as error:
                if not opened.done():
                    opened.set_exception(error)
                    return
                raise

        ended = asyncio.run_coroutine_threadsafe(hold(), self.loop)
        try:
            yield opened.result(WAIT_SECONDS)
        finally:
            self.loop.call_soon_threadsafe(stop.set)
            ended.result(WAIT_SECONDS)

    def close(self) -> None:
        """Ends the loop; fails when a task was left behind on it."""
        left = self.run(_cancel_what_is_left())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        if left:
            raise AssertionError(f"tasks were left behind on the loop: {left}")


async def _cancel_what_is_left() -> list[str]:
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    return [repr(task.get_coro()) for task in left]
