"""What all runs of the process share, and one run's grip on it: the lease, peers that answer late, durable appends."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import grpc
from mainspring.v1 import types_pb2
from mainspring_kit.errors import MainspringError
from mainspring_kit.identity import UserExecutionContext
from mainspring_kit.tasks import raise_if_cancelled

from mainspring_execution.engine.attention import Attention
from mainspring_execution.engine.catalog import Catalog
from mainspring_execution.engine.deltas import Deltas
from mainspring_execution.engine.journal import Journal
from mainspring_execution.engine.lease import Lease
from mainspring_execution.peers import UNREACHED, Dispatcher, State

REACH_SECONDS: Final = 0.25

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all runs of the process share."""

    state: State
    dispatcher: Dispatcher
    catalog: Catalog
    lease: Lease
    deltas: Deltas


class Grip:
    """Whether a run is still this process's, and its waits for what must be known before it may go on."""

    def __init__(
        self,
        surroundings: Surroundings,
        context: UserExecutionContext,
        *,
        attention: Attention,
        journal: Journal,
        lapses: int,
    ) -> None:
        """`lapses`: of the lease, when it was last known that the run is this process's."""
        self._around = surroundings
        self._context = context
        self._attention = attention
        self._journal = journal
        self._lapses = lapses

    async def hold_lease(self) -> bool:
        """Whether an effect may start now; waits for the lease where it lapsed. False: look at the interrupts."""
        lease = self._around.lease
        while not lease.is_held or lease.lapses != self._lapses:
            if self._attention.is_interrupted:
                return False
            lapses = lease.lapses
            if not lease.is_held:
                await self._attention.listen(lease.wait_held())
            elif await self._is_still_held():
                self._lapses = lapses
            else:
                return False
        return True

    async def wait_durable(self) -> None:
        """Until every append is durable, or an interrupt."""
        self._attention.is_awaiting_answers = True
        while not self._journal.is_settled and not self._attention.is_interrupted:
            await self._attention.wait()
        self._attention.is_awaiting_answers = False

    async def reach(self, ask: Callable[[], Awaitable[Answer]], *, only_abandoned: bool = False) -> Answer | None:
        """Asks a peer until it answers; None when interrupted, or when the run is no more."""
        attention = self._attention
        while True:
            try:
                return await ask()
            except MainspringError as error:
                if error.code is grpc.StatusCode.NOT_FOUND:
                    attention.abandon()
                elif error.code not in UNREACHED:
                    raise
            raise_if_cancelled()
            if attention.is_abandoned or (attention.is_interrupted and not only_abandoned):
                return None
            await asyncio.sleep(REACH_SECONDS * random.uniform(0.5, 1.0))

    async def get_run(self) -> types_pb2.Run:
        """The run as it is now."""
        return await self._around.state.get_run(self._context, self._journal.envelope.run_id)

    async def _is_still_held(self) -> bool:
        """After a lapse another executor may hold the run: an append that is taken says no, else state is asked."""
        if self._journal.flush():
            await self.wait_durable()
            return not self._attention.is_interrupted
        run = await self.reach(self.get_run)
        if run is None:
            return False
        if run.epoch != self._journal.epoch:
            self._attention.abandon()
            return False
        return True
