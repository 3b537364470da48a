"""The stream to one dispatcher: registers, beats, takes calls, returns outcomes, and opens again when it broke."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

import grpc

from mainspring.errors import WorkerError
from mainspring.tool import Declaration
from mainspring.v1 import dispatcher_pb2 as pb
from mainspring.v1 import dispatcher_pb2_grpc as rpc
from mainspring.worker.calls import Calls
from mainspring.worker.logs import note

BEAT_SECONDS: Final = 1.0
REGISTER_SECONDS: Final = 15.0
RECONNECT_SECONDS_MIN: Final = 0.05
RECONNECT_SECONDS_MAX: Final = 1.0
FRAME_ITEMS_MAX: Final = 512
FRAME_BYTES_MAX: Final = 1 << 20
# The last outcomes are kept, as many as calls are under way at most: when the stream breaks they may not have arrived,
# and are sent again. What a broken connection can hold is less than this.
KEPT_BYTES_MAX: Final = 32 << 20

_MESSAGE_BYTES_MAX: Final = 20 << 20
_CHANNEL_OPTIONS: Final = [
    ("grpc.keepalive_time_ms", 1_000),
    # On a slow line a ping's answer waits behind megabytes of results. Runs do not wait for this: who calls a
    # dispatcher that stands still notices in 3 s and goes to another one.
    ("grpc.keepalive_timeout_ms", 15_000),
    ("grpc.http2.ping_timeout_ms", 15_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", _MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", _MESSAGE_BYTES_MAX),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
]
# Answers that trying again does not change.
_FATAL: Final = frozenset(
    {
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
# What grpc.aio raises when a call breaks under a writer; the reader learns why.
_BROKEN: Final = (grpc.RpcError, asyncio.InvalidStateError, grpc.aio.UsageError, grpc.aio.InternalError)

AttachCall = grpc.aio.StreamStreamCall[Any, Any]  # Any: as grpc's own stubs


class Link:
    """One dispatcher, by address. Outcomes wait here while the stream is broken."""

    def __init__(self, address: str, *, hello: pb.AttachHello, token: Callable[[], str], calls: Calls) -> None:
        self.address = address
        self.is_attached = False
        self._is_noted = False
        self._hello = hello
        self._token = token
        self._calls = calls
        self._results: deque[pb.WorkerResult] = deque()
        self._cancelled: list[str] = []
        self._sent: deque[pb.WorkerResult] = deque()
        self._sent_bytes = 0
        self._draining = False
        self._leaving = False
        self._changed = asyncio.Event()

    def put(self, result: pb.WorkerResult) -> None:
        """Queues an outcome."""
        self._results.append(result)
        self._changed.set()

    def acknowledge(self, call_id: str) -> None:
        """Queues the word that a cancel took effect."""
        self._cancelled.append(call_id)

    def drain(self) -> None:
        """Asks for no more calls."""
        self._draining = True
        self._changed.set()

    def leave(self) -> None:
        """Ends the stream once everything queued is sent."""
        self._leaving = True
        self._changed.set()

    async def run(self, wanted: Callable[[], bool], attached: Callable[[], None]) -> None:
        """Keeps the stream until `leave`, or until it broke and is no longer wanted; WorkerError when refused."""
        delay = RECONNECT_SECONDS_MIN
        async with grpc.aio.insecure_channel(self.address, options=_CHANNEL_OPTIONS) as channel:
            while wanted() and not self._leaving:
                try:
                    await self._converse(channel, attached)
                except grpc.aio.AioRpcError as error:
                    self._note(error)
                except (TimeoutError, *_BROKEN) as error:
                    note(logging.WARNING, "stream_broken", dispatcher=self.address, detail=repr(error))
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    # A cancel that met the call in the moment it failed came out as the call's status.
                    raise asyncio.CancelledError
                delay = RECONNECT_SECONDS_MIN if self.is_attached else min(delay * 2, RECONNECT_SECONDS_MAX)
                self.is_attached = False
                self._take_back()
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))

    async def _converse(self, channel: grpc.aio.Channel, attached: Callable[[], None]) -> None:
        metadata = (("authorization", f"Bearer {self._token()}"),)
        call: AttachCall = rpc.DispatcherServiceStub(channel).Attach(metadata=metadata)
        try:
            async with asyncio.timeout(REGISTER_SECONDS):
                await call.write(pb.AttachRequest(hello=self._make_hello()))
                registered = await call.read()
            if not isinstance(registered, pb.AttachResponse):
                return
            self.is_attached = True
            self._is_noted = False
            note(logging.INFO, "worker_attached", dispatcher=self.address, tools=len(registered.registered))
            attached()
            async with asyncio.TaskGroup() as tasks:
                writer = tasks.create_task(self._write(call))
                await self._read(call)
                writer.cancel()
        except ExceptionGroup as group:
            # The reader's: the writer leaves quietly.
            raise group.exceptions[0] from None
        finally:
            call.cancel()

    def _make_hello(self) -> pb.AttachHello:
        hello = pb.AttachHello()
        hello.CopyFrom(self._hello)
        hello.known_dispatch_ids.extend(self._calls.dispatches_of(self))
        hello.known_dispatch_ids.extend(result.dispatch_id for result in self._results)
        return hello

    async def _read(self, call: AttachCall) -> None:
        while isinstance(frame := await call.read(), pb.AttachResponse):
            for wanted in frame.calls:
                self._calls.start(wanted, self)
            for dispatch_id in frame.cancel_dispatch_ids:
                self._calls.cancel(dispatch_id, self)

    async def _write(self, call: AttachCall) -> None:
        """Sends what is queued as it comes, and a beat each second."""
        loop = asyncio.get_running_loop()
        beat_time = loop.time()
        try:
            while True:
                if not self._results:
                    with suppress(TimeoutError):
                        async with asyncio.timeout_at(beat_time):
                            await self._changed.wait()
                self._changed.clear()
                now = loop.time()
                frame = pb.AttachRequest(
                    results=self._take(), cancelled_call_ids=self._cancelled, draining=self._draining
                )
                self._cancelled = []
                if now >= beat_time:
                    frame.in_flight = self._calls.in_flight
                    beat_time = now + BEAT_SECONDS
                await call.write(frame)
                if self._leaving and not self._results:
                    await call.done_writing()
                    return
        except _BROKEN:
            return

    def _take(self) -> list[pb.WorkerResult]:
        """A frame's worth of outcomes."""
        taken: list[pb.WorkerResult] = []
        frame_bytes = 0
        while self._results and len(taken) < FRAME_ITEMS_MAX and frame_bytes < FRAME_BYTES_MAX:
            result = self._results.popleft()
            frame_bytes += len(result.result)
            taken.append(result)
        self._sent.extend(taken)
        self._sent_bytes += frame_bytes
        while len(self._sent) > self._hello.concurrency or (self._sent_bytes > KEPT_BYTES_MAX and len(self._sent) > 1):
            self._sent_bytes -= len(self._sent.popleft().result)
        return taken

    def _take_back(self) -> None:
        """The stream broke: what was sent last goes out again first. The dispatcher drops what it has."""
        self._results.extendleft(reversed(self._sent))
        self._sent.clear()
        self._sent_bytes = 0

    def _note(self, error: grpc.aio.AioRpcError) -> None:
        code = error.code()
        # A stream that stood ends so when its token has run out; whether there is a new one the next try finds out.
        if code in _FATAL and not self.is_attached:
            raise WorkerError(
                f"The dispatcher at {self.address} refuses this worker: {code.name}: {error.details()}"
            ) from error
        # While a dispatcher is away each try finds that out; saying so once is enough.
        level = logging.WARNING if self.is_attached else logging.DEBUG if self._is_noted else logging.INFO
        self._is_noted = True
        note(level, "stream_broken", dispatcher=self.address, code=code.name, detail=error.details())


def hello_of(worker_id: str, tools: Mapping[str, Declaration], *, concurrency: int) -> pb.AttachHello:
    """A worker's first word."""
    return pb.AttachHello(
        worker_id=worker_id,
        tools=[declaration.to_message() for declaration in tools.values()],
        concurrency=concurrency,
    )
