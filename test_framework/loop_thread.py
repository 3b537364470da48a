"""An event loop in a thread of its own, for synchronous tests. Owns the loop and what runs on it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

WAIT_SECONDS = 60.0

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for a synchronous caller; `close` gives back everything that was opened, last first."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_debug(True)
        self._held: list[tuple[asyncio.Event, Future[None]]] = []
        self._thread = threading.Thread(target=self._turn, name=name)
        self._thread.start()

    def _turn(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    # Any: what a coroutine yields and is sent is the loop's own affair.
    def run(self, coroutine: Coroutine[Any, Any, T], timeout_seconds: float = WAIT_SECONDS) -> T:
        """Runs a coroutine on the loop and waits for its answer."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_seconds)

    def open(self, make: Callable[[], AbstractAsyncContextManager[T]]) -> T:
        """Enters an async context manager, which stays open until `close`; entered and left in one task."""
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
        self._held.append((stop, ended))
        return opened.result(WAIT_SECONDS)

    def close(self) -> None:
        """Leaves what is open, last first, then ends the loop; raises all that went wrong meanwhile."""
        errors: list[Exception] = []
        for stop, ended in reversed(self._held):
            self.loop.call_soon_threadsafe(stop.set)
            try:
                ended.result(WAIT_SECONDS)
            except Exception as error:
                errors.append(error)
        left = self.run(_cancel_what_is_left())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        if left:
            errors.append(AssertionError(f"tasks were left behind on the loop: {left}"))
        if errors:
            raise ExceptionGroup("what ran on the loop did not end well", errors)


async def _cancel_what_is_left() -> list[str]:
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    return [repr(task.get_coro()) for task in left]
