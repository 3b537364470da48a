"""How a run waits: for whatever comes first, an answer or an interrupt. Interrupts only wake; the run's task acts."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from mainspring.v1 import state_pb2

Answer = TypeVar("Answer")


class Attention:
    """What may interrupt one run, and its waits. Each wait returns early when interrupted; the caller looks why.

    A cancel interrupts at once. Other `inputs` only wake: they are taken between two steps, in the order they came in.
    """

    __slots__ = (
        "_heard",
        "_thinking",
        "_waiter",
        "cancel_input",
        "inputs",
        "is_abandoned",
        "is_awaiting_answers",
        "is_ending",
        "is_expired",
        "is_leaving",
        "is_troubled",
    )

    def __init__(self) -> None:
        self.cancel_input: state_pb2.RunInput | None = None
        self.inputs: list[state_pb2.RunInput] = []
        # State tells an input again until it is consumed.
        self._heard: set[str] = set()
        self.is_expired = False
        # This process is about to stop: the run is given back before its next step.
        self.is_leaving = False
        self.is_troubled = False
        self.is_abandoned = False
        # The terminal event, or the word that the run is given back, is on its way: a cancel or the deadline comes too
        # late to interrupt anything.
        self.is_ending = False
        # Only then an answered append is worth waking for.
        self.is_awaiting_answers = False
        self._waiter: asyncio.Future[None] | None = None
        # Any: what the task returns is nobody's concern here.
        self._thinking: asyncio.Task[Any] | None = None

    @property
    def is_interrupted(self) -> bool:
        """Whether the run shall look up from what it waits for."""
        if self.is_abandoned or self.is_troubled:
            return True
        return not self.is_ending and (self.is_expired or self.cancel_input is not None)

    def hear(self, request: state_pb2.RunInput) -> None:
        """Somebody asked something of the run."""
        if request.request_id in self._heard:
            return
        self._heard.add(request.request_id)
        if not request.HasField("cancel"):
            self.inputs.append(request)
            self.wake()
        elif self.cancel_input is None:
            self.cancel_input = request
            self._interrupt()

    def hear_again(self) -> None:
        """What was taken may not have been recorded: state tells it again, unless it was."""
        self._heard = {request.request_id for request in self.inputs}

    def leave(self) -> None:
        """The run shall be given back when its step is done."""
        self.is_leaving = True
        self.wake()

    def expire(self) -> None:
        """The run's deadline passed."""
        self.is_expired = True
        self._interrupt()

    def abandon(self) -> None:
        """The run is no longer this process's: nothing more may be done for it."""
        self.is_abandoned = True
        self._interrupt()

    def alarm(self) -> None:
        """An append was refused."""
        self.is_troubled = True
        self._interrupt()

    def hear_answer(self) -> None:
        """An append became durable."""
        if self.is_awaiting_answers:
            self.wake()

    def wake(self, _: object = None) -> None:
        """Ends the wait under way, if there is one."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self, futures: Iterable[asyncio.Future[Any]] = ()) -> None:
        """Until one of the futures is done (Any: of whatever), or `wake`, or an interrupt."""
        awaited = list(futures)
        if self.is_interrupted or any(future.done() for future in awaited):
            return
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        for future in awaited:
            future.add_done_callback(self.wake)
        try:
            await waiter
        finally:
            self._waiter = None
            for future in awaited:
                future.remove_done_callback(self.wake)

    async def pause(self, seconds: float, futures: Iterable[asyncio.Future[Any]] = ()) -> None:
        """As `wait`, for so many seconds at most; infinite: no such bound."""
        if seconds == math.inf:
            await self.wait(futures)
            return
        timer = asyncio.get_running_loop().call_later(seconds, self.wake)
        try:
            await self.wait(futures)
        finally:
            timer.cancel()

    async def listen(self, thinking: Coroutine[Any, Any, Answer]) -> Answer | None:
        """Awaits a coroutine (Any: as typed by Python) and cancels it at an interrupt; None when interrupted."""
        if self.is_interrupted:
            thinking.close()
            return None
        task = self._thinking = asyncio.current_task()
        try:
            return await thinking
        except asyncio.CancelledError:
            # As asyncio.timeout does: a cancel of ours is taken back, anybody else's goes on.
            if task is not None and self.is_interrupted and task.uncancel() == 0:
                return None
            raise
        finally:
            self._thinking = None

    def _interrupt(self) -> None:
        if not self.is_interrupted:
            return
        self.wake()
        if self._thinking is not None:
            task, self._thinking = self._thinking, None
            task.cancel()
