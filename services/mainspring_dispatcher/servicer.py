"""The dispatcher as the wire sees it: unpacks frames for the board, packs what the board sends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from mainspring.v1 import dispatcher_pb2 as pb
from mainspring.v1 import dispatcher_pb2_grpc as rpc
from mainspring_kit import telemetry
from mainspring_kit.errors import MainspringError, Reason
from mainspring_kit.identity import caller_variable
from mainspring_kit.interceptors import ServicerContext
from mainspring_kit.streams import Replies, serve_batches

from mainspring_dispatcher.core.board import CANCEL_SECONDS, Board
from mainspring_dispatcher.core.outcomes import check_hello
from mainspring_dispatcher.peers import Registry

HELLO_SECONDS: Final = 5.0
CALLS_PER_STREAM_MAX: Final = 8_192
FRAMES_PER_WORKER_MAX: Final = 65_536
DRAIN_POLL_SECONDS: Final = 0.02
# While draining: how long calls that another dispatcher may repeat are waited for.
DRAIN_REPEATABLE_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class _Word:
    """What a worker is told besides calls."""

    cancel_dispatch_id: int = 0
    draining: bool = False

    def ByteSize(self) -> int:
        return 12


class _CallStream:
    """A caller's stream: a `Caller` of the board."""

    def __init__(self, board: Board) -> None:
        self.replies: Replies[pb.ToolResult] = Replies("CallTools", CALLS_PER_STREAM_MAX)
        self.gone = False
        self.fault: MainspringError | None = None
        self._board = board
        self._time = asyncio.get_running_loop().time

    def receive(self, frame: pb.CallToolsRequest) -> None:
        """Hands a frame's calls to the board; once draining they are left unanswered, to be sent elsewhere."""
        if self.fault is not None:
            return
        self.replies.expect(len(frame.calls))
        now = self._time()
        for call in frame.calls:
            self._board.submit(call, self, now=now)

    def answer(self, result: pb.ToolResult) -> None:
        """Queues an outcome; a reader that falls too far behind loses the stream, and sends again."""
        if self.gone:
            return
        try:
            self.replies.put(result)
        except MainspringError as error:
            self.end(error)
            self.replies.outbox.close()

    def end(self, fault: MainspringError) -> None:
        """Takes no more calls; the stream ends when those it has are answered."""
        self.fault = self.fault or fault
        self.replies.end()


class _WorkerStream:
    """A worker's stream: a `Link` of the board."""

    def __init__(self, worker_id: str) -> None:
        self.replies: Replies[pb.WorkerCall | _Word] = Replies(f"Attach {worker_id}", FRAMES_PER_WORKER_MAX)
        self.fault: MainspringError | None = None
        self._worker_id = worker_id

    def call(self, call: pb.WorkerCall) -> None:
        self._put(call)

    def cancel(self, dispatch_id: int) -> None:
        self._put(_Word(cancel_dispatch_id=dispatch_id))

    def drain(self) -> None:
        """Tells the worker that this dispatcher is leaving."""
        self._put(_Word(draining=True))

    def close(self, fault: str) -> None:
        message = f"The stream of worker {self._worker_id} ends: {fault}. Attach again."
        self._fail(MainspringError(Reason.DRAINING, message, peer="dispatcher"))

    def _put(self, item: pb.WorkerCall | _Word) -> None:
        if self.fault is not None:
            return
        try:
            self.replies.outbox.put(item)
        except MainspringError as error:
            self._fail(error)

    def _fail(self, fault: MainspringError) -> None:
        self.fault = self.fault or fault
        self.replies.outbox.close()


class DispatcherServicer(rpc.DispatcherServiceServicer):
    """DispatcherService: CallTools, CancelCalls, Attach. The rest comes later."""

    def __init__(self, board: Board, registry: Registry) -> None:
        self._board = board
        self._registry = registry
        self._call_streams: set[_CallStream] = set()
        self._worker_streams: set[_WorkerStream] = set()
        self._draining: MainspringError | None = None

    async def CallTools(
        self, request_iterator: AsyncIterator[pb.CallToolsRequest], context: ServicerContext
    ) -> AsyncIterator[pb.CallToolsResponse]:
        stream = _CallStream(self._board)
        self._call_streams.add(stream)
        try:
            if self._draining is not None:
                raise self._draining
            yield pb.CallToolsResponse()  # so that the caller knows that the stream stands
            async with aclosing(_serve_calls(request_iterator, stream)) as frames:  # type: ignore[type-var]  # a generator
                async for frame in frames:
                    yield frame
            if stream.fault is not None:
                raise stream.fault
        finally:
            stream.gone = True
            self._call_streams.discard(stream)

    async def CancelCalls(self, request: pb.CancelCallsRequest, context: ServicerContext) -> pb.CancelCallsResponse:
        loop = asyncio.get_running_loop()
        told: list[asyncio.Future[pb.CancelOutcome]] = []
        for call_id in request.call_ids:
            future: asyncio.Future[pb.CancelOutcome] = loop.create_future()
            told.append(future)
            self._board.cancel(request.tenant_id, call_id, told=_setter(future), now=loop.time())
        async with asyncio.timeout(CANCEL_SECONDS + 1):
            return pb.CancelCallsResponse(outcomes=[await future for future in told])

    async def Attach(
        self, request_iterator: AsyncIterator[pb.AttachRequest], context: ServicerContext
    ) -> AsyncIterator[pb.AttachResponse]:
        requests = aiter(request_iterator)
        hello = await _read_hello(requests)
        loop = asyncio.get_running_loop()
        user_context = caller_variable.get().context
        tenant_id = user_context.tenant_id if user_context is not None else ""
        registered = await self._registry.register(hello.tools, user_context)
        for tool in registered:
            self._board.learn(tenant_id, tool, now=loop.time())
        if self._draining is not None:
            raise self._draining
        yield pb.AttachResponse(registered=registered)
        stream = _WorkerStream(hello.worker_id)
        worker = self._board.attach(tenant_id, hello, link=stream, now=loop.time())
        self._worker_streams.add(stream)
        log = telemetry.logger().bind(worker_id=hello.worker_id, tenant_id=tenant_id)
        log.info("worker_attached", tools=len(hello.tools), concurrency=hello.concurrency)

        def receive(frame: pb.AttachRequest) -> None:
            now = worker.seen = loop.time()
            if frame.draining:
                self._board.drain(worker, now=now)
            for call_id in frame.cancelled_call_ids:
                self._board.acknowledge(worker, call_id, now=now)
            for result in frame.results:
                self._board.finish(worker, result, now=now)

        returns = True
        try:
            async with aclosing(serve_batches(requests, stream.replies, receive=receive, frame=_pack_words)) as frames:  # type: ignore[type-var]  # a generator
                async for frame in frames:
                    yield frame
            if stream.fault is not None:
                raise stream.fault
            # A broken connection may look like the peer's last word; one who leaves has said so before.
            returns = not worker.draining
        finally:
            self._worker_streams.discard(stream)
            self._board.detach(worker, stream, now=loop.time(), returns=returns)
            log.info("worker_detached", returns=returns)

    async def drain(self, seconds: float) -> None:
        """Takes no more calls, lets those under way end, ends the streams. Senders go to another dispatcher.

        Calls that may be repeated are waited for a second, the others as long as may be.
        """
        self._draining = MainspringError(
            Reason.DRAINING, "This dispatcher is leaving: use another one at once.", peer="dispatcher"
        )
        for worker in self._worker_streams:
            worker.drain()
        for stream in self._call_streams:
            stream.end(self._draining)
        loop = asyncio.get_running_loop()
        start = loop.time()
        while self._board.under_way and (waited := loop.time() - start) < seconds:
            if waited >= DRAIN_REPEATABLE_SECONDS and not self._board.has_unrepeatable:
                break
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        for stream in self._call_streams:
            stream.replies.outbox.close()
        for worker in self._worker_streams:
            worker.close("the dispatcher is leaving")


def _serve_calls(
    requests: AsyncIterator[pb.CallToolsRequest], stream: _CallStream
) -> AsyncIterator[pb.CallToolsResponse]:
    return serve_batches(
        requests, stream.replies, receive=stream.receive, frame=lambda results: pb.CallToolsResponse(results=results)
    )


async def _read_hello(requests: AsyncIterator[pb.AttachRequest]) -> pb.AttachHello:
    """The worker's first frame; HELLO_MISSING when it does not come, REQUEST_INVALID when it is not valid."""
    try:
        async with asyncio.timeout(HELLO_SECONDS):
            first = await anext(requests, None)
    except TimeoutError as error:
        raise MainspringError(
            Reason.HELLO_MISSING, f"No hello came within {HELLO_SECONDS:g} s: send it first.", seconds=HELLO_SECONDS
        ) from error
    check_hello(first.hello if first is not None else pb.AttachHello())
    assert first is not None
    return first.hello


def _pack_words(items: list[pb.WorkerCall | _Word]) -> pb.AttachResponse:
    words = [item for item in items if isinstance(item, _Word)]
    return pb.AttachResponse(
        calls=[item for item in items if not isinstance(item, _Word)],
        cancel_dispatch_ids=[word.cancel_dispatch_id for word in words if word.cancel_dispatch_id],
        draining=any(word.draining for word in words),
    )


def _setter(future: asyncio.Future[pb.CancelOutcome]) -> Callable[[pb.CancelOutcome], None]:
    """Tells the future, unless whoever asked has gone."""

    def told(outcome: pb.CancelOutcome) -> None:
        if not future.done():
            future.set_result(outcome)

    return told
