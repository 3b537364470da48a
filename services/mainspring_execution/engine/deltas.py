"""Unfinished text on its way to the state processes: transient, so it is merged, and dropped where nobody takes it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final

import grpc
from mainspring.v1 import state_pb2
from mainspring_kit.identity import UserExecutionContext
from mainspring_kit.streams import BROKEN_CALL
from mainspring_kit.tasks import background, raise_if_cancelled

from mainspring_execution.core.unsent import TextSource, Unsent
from mainspring_execution.peers import DeltaCall, State

RECONNECT_SECONDS_MIN: Final = 0.05
RECONNECT_SECONDS_MAX: Final = 1.0
ADDRESS_REFRESH_SECONDS: Final = 1.0
# Between two frames to one state process.
FRAME_SECONDS_MIN: Final = 0.02


class _Link:
    """The stream to one state process, and what waits for it."""

    def __init__(self) -> None:
        self.state_id = ""
        self.is_live = False
        self.unsent = Unsent()
        self.changed = asyncio.Event()

    def break_off(self) -> None:
        self.is_live = False
        self.unsent.clear()


class Deltas:
    """A stream of text to every state process, each run's on one of them. Nobody ever waits for it."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._links: dict[str, _Link] = {}

    @property
    def is_live(self) -> bool:
        """Whether any state process takes text now."""
        return any(link.is_live for link in self._links.values())

    def writer(
        self, context: UserExecutionContext, run_id: str, *, step: int, state_id: str = ""
    ) -> Callable[[str], None]:
        """What takes the text of one attempt at a model step, piece by piece from its beginning.

        `state_id`: the state process where the run's appends go; its watchers are there. Where it can't be reached
        another one passes the text on. A piece that nobody can take is lost, and what follows of this attempt with it.
        """
        source = TextSource(tenant_id=context.tenant_id, user_id=context.user_id, run_id=run_id, step=step)
        link: _Link | None = None

        def write(text: str) -> None:
            nonlocal link
            if not text or source.is_lost:
                return
            if link is None or not link.is_live:
                link = self._choose(state_id)
            if link is None or not link.unsent.add(source, text):
                source.is_lost = True
                return
            source.length += len(text)
            link.changed.set()

        return write

    async def run(self) -> None:
        """Keeps a stream to every address of state, as long as it is awaited."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                for address in await self._state.addresses():
                    if address not in self._links:
                        self._links[address] = _Link()
                        tasks.create_task(self._keep(address))
                await asyncio.sleep(ADDRESS_REFRESH_SECONDS)

    def _choose(self, state_id: str) -> _Link | None:
        found = None
        for link in self._links.values():
            if link.is_live:
                if link.state_id == state_id:
                    return link
                found = found or link
        return found

    async def _keep(self, address: str) -> None:
        """Opens the stream to one state process again and again until its address is no more."""
        link = self._links[address]
        delay = RECONNECT_SECONDS_MIN
        while True:
            try:
                await self._converse(address, link)
            except (grpc.RpcError, *BROKEN_CALL):
                pass  # the stream of appends to the same process says so in the log
            raise_if_cancelled()
            delay = RECONNECT_SECONDS_MIN if link.is_live else min(delay * 2, RECONNECT_SECONDS_MAX)
            link.break_off()
            if address not in await self._state.addresses():
                del self._links[address]
                return
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))

    async def _converse(self, address: str, link: _Link) -> None:
        call = self._state.open_deltas(address)
        response: state_pb2.PublishDeltasResponse
        try:
            await call.wait_for_connection()
            async with background(_send(call, link)):
                async for response in call:
                    link.state_id, link.is_live = response.state_id, True
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group
        finally:
            call.cancel()


async def _send(call: DeltaCall, link: _Link) -> None:
    """The first piece after a silence goes at once, with all of its turn of the loop; the next ones are collected.

    Nobody reads faster than that, and each frame and each of its pieces costs three processes their time.
    """
    while True:
        link.changed.clear()
        if not link.unsent:
            await link.changed.wait()
        await call.write(state_pb2.PublishDeltasRequest(deltas=link.unsent.take()))
        await asyncio.sleep(FRAME_SECONDS_MIN)
