"""The executor's lease: one beat a second for all its runs, and the inputs that come back with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

import grpc
from mainspring.v1 import state_pb2
from mainspring_kit import telemetry
from mainspring_kit.tasks import background, raise_if_cancelled

from mainspring_execution.peers import BeatCall, State, first_of

BEAT_SECONDS: Final = 1.0
BEAT_ANSWER_SECONDS: Final = 1.0
# So many beats without an answer are enough to try another instance.
UNANSWERED_MAX: Final = 2
# Until state has said how long it holds an executor for alive.
LEASE_SECONDS_DEFAULT: Final = 3.0
# What a clock, a pause or a frame under way may cost between the last check and the effect.
MARGIN_SECONDS: Final = 1.0
LEAVE_SECONDS: Final = 2.0


class Lease:
    """Whether this process may act for its runs. `address` is the state instance that beats go to."""

    def __init__(self, state: State, executor_id: str) -> None:
        self.executor_id = executor_id
        self.address = ""
        self.lapses = 0
        self._state = state
        self._take_input: Callable[[state_pb2.RunInput], None] | None = None
        self._lease_seconds = LEASE_SECONDS_DEFAULT
        self._acknowledged_time = float("-inf")
        self._sent_times: dict[int, float] = {}
        self._held = asyncio.Event()
        self._leaving = asyncio.Event()
        self._left = asyncio.Event()

    @property
    def is_held(self) -> bool:
        """Whether an effect may start: the last acknowledged beat is younger than the lease less its margin."""
        age = time.monotonic() - self._acknowledged_time
        return age < self._lease_seconds - MARGIN_SECONDS and not self._leaving.is_set()

    async def wait_held(self) -> None:
        """Waits until the lease is held."""
        while not self.is_held:
            self._held.clear()
            await self._held.wait()

    async def leave(self) -> None:
        """Says that the executor leaves, so that its runs may be claimed at once; nothing may be driven any more."""
        self._leaving.set()
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                await self._left.wait()
        except TimeoutError:
            # Nobody heard it: the runs are claimed when the beats are missed.
            telemetry.logger().warning("leave_not_acknowledged", executor_id=self.executor_id)

    async def beat(self, take_input: Callable[[state_pb2.RunInput], None]) -> None:
        """Beats to one instance, to the next one when that breaks; as long as it is awaited."""
        self._take_input = take_input
        attempt = 0
        while not self._left.is_set():
            address = await first_of(await self._state.addresses(), attempt=attempt)
            if address:
                try:
                    await self._converse(address)
                except (grpc.RpcError, grpc.aio.UsageError, asyncio.InvalidStateError, TimeoutError) as error:
                    telemetry.logger().info("beat_broken", address=address, cause=type(error).__name__)
                raise_if_cancelled()
            self.address = ""
            attempt += 1
            await asyncio.sleep(0.05 if attempt % 8 else 0.5)

    async def _converse(self, address: str) -> None:
        call = self._state.open_heartbeat(address)
        self._sent_times.clear()
        try:
            async with background(self._read(call)):
                number = 0
                while not self._left.is_set():
                    number += 1
                    leaving = self._leaving.is_set()
                    self._sent_times[number] = time.monotonic()
                    async with asyncio.timeout(BEAT_ANSWER_SECONDS):
                        await call.write(
                            state_pb2.HeartbeatRequest(executor_id=self.executor_id, beat=number, leaving=leaving)
                        )
                    self.address = address
                    await self._pause()
                    if len(self._sent_times) >= UNANSWERED_MAX:
                        raise TimeoutError
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group
        finally:
            # State loses patience sooner with an executor whose stream broke: nothing is held until it answers again.
            self._acknowledged_time = float("-inf")
            call.cancel()

    async def _pause(self) -> None:
        """Until the next beat is due, or there is a reason to beat at once."""
        waiting_for = self._left if self._leaving.is_set() else self._leaving
        try:
            async with asyncio.timeout(BEAT_SECONDS):
                await waiting_for.wait()
        except TimeoutError:
            return

    async def _read(self, call: BeatCall) -> None:
        response: state_pb2.HeartbeatResponse
        async for response in call:
            if response.HasField("lease"):
                self._lease_seconds = max(MARGIN_SECONDS, response.lease.ToNanoseconds() / 1e9)
            sent_time = self._sent_times.get(response.beat)
            if sent_time is not None:
                self._sent_times = {beat: sent for beat, sent in self._sent_times.items() if beat > response.beat}
                self._acknowledge(sent_time)
            for request in response.inputs:
                if self._take_input is not None:
                    self._take_input(request)
            if response.beat and self._leaving.is_set() and not self._sent_times:
                self._left.set()
        raise grpc.aio.UsageError("the stream of beats ended")

    def _acknowledge(self, sent_time: float) -> None:
        """The lease holds from when the beat was sent, not from when the answer came."""
        if sent_time - self._acknowledged_time > self._lease_seconds - MARGIN_SECONDS:
            self.lapses += 1
        self._acknowledged_time = max(sent_time, self._acknowledged_time)
        self._held.set()
