"""A call over the simulated network: two lanes of messages, the client's object, and the handler at the server.

Messages cross as bytes. What is taken over from gRPC: a broken call loses what is on its way, ends its handler, and
says UNAVAILABLE to its caller; nothing is lost or doubled while a call stands.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.rpc import status_pb2
from mainspring.v1 import identity_pb2
from mainspring_kit.errors import MainspringError, to_status
from mainspring_kit.identity import CONTEXT_KEY, Caller, Principal, UserExecutionContext, caller_variable
from mainspring_kit.streams import call_tasks
from mainspring_kit.tasks import background

from tests.simulation.loop import Process

if TYPE_CHECKING:
    from tests.simulation.network import Host, Network

# Any in this module: generated stubs and servicers are generic over messages that only they know.

USER_KEY: Final = "simulated-user"
SERVICE: Final = Principal("service", "", "", ("service",), is_service=True, expire_time=1e12)
NOTICE_SECONDS: Final = 0.02


class Lane:
    """One direction of a call: messages in order, then its end."""

    def __init__(self, call: Call, receiver: Process) -> None:
        self.messages: deque[Any] = deque()
        self.error: BaseException | None = None
        self.has_ended = False
        self._call = call
        self._receiver = receiver
        self._last_arrival = 0.0
        self._waiter: asyncio.Future[None] | None = None

    def send(self, arrive: Callable[..., None], *args: Any) -> None:
        """Something goes on its way behind what was sent before."""
        network = self._call.network
        stalled_until = max(process.stalled_until for process in self._call.ends)
        arrival = max(network.loop.now, stalled_until) + network.delay()
        self._last_arrival = max(self._last_arrival + 1e-9, arrival)
        network.loop.call_at(self._last_arrival, self._arrive, arrive, args, context=self._receiver.context)

    def push(self, message: Any) -> None:
        self.messages.append(message)
        self.wake()

    def end(self) -> None:
        self.has_ended = True
        self.wake()

    def fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> Any:
        """The next message; EOF at the end; raises what broke the call."""
        while not self.messages:
            if self.error is not None:
                raise self.error
            if self.has_ended:
                return grpc.aio.EOF
            self._waiter = self._call.network.loop.create_future()
            await self._waiter
        return self.messages.popleft()

    def _arrive(self, arrive: Callable[..., None], args: tuple[Any, ...]) -> None:
        if not self._call.is_broken:
            arrive(*args)


class Call:
    """A call under way: the client's object, and the handler at the server."""

    def __init__(self, network: Network, client: Process, path: str, *, metadata: Any, deserialize: Any) -> None:
        self.network = network
        self.path = path
        self.is_broken = False
        self.answer: asyncio.Future[Any] | None = None
        self.ends: tuple[Process, ...] = (client,)
        self._client = client
        self._metadata = dict(metadata)
        self._deserialize = deserialize
        self._responses = Lane(self, client)
        self._requests: Lane | None = None
        self._task: asyncio.Task[None] | None = None
        self._method: Any = None

    def open(self, host: Host | None) -> None:
        """Connects, or fails in a moment."""
        service, _, method = self.path.removeprefix("/mainspring.v1.").partition("/")
        if host is None or host.process is None or service not in host.servicers:
            self.is_broken = True
            self._responses.fail(rpc_error(grpc.StatusCode.UNAVAILABLE))
            return
        server = host.process
        self._method = getattr(host.servicers[service], method)
        self.ends = (self._client, server)
        self.network.calls[self] = None
        self._requests = Lane(self, server)
        if self.answer is None:
            self._requests.send(self._serve)

    def send_request(self, request: Any) -> None:
        """The one request of a call that has one."""
        if self._requests is None:
            return
        self.network.on_send(self._client, self.path, request)
        kind, data = type(request), request.SerializeToString()
        if self.answer is None:
            self._requests.send(self._take_request, kind, data)
        else:
            self._requests.send(self._serve_one, kind, data)

    async def wait_for_connection(self) -> None:
        """Raises when there is none."""
        if self._responses.error is not None:
            raise self._responses.error

    async def write(self, request: Any) -> None:
        if self._responses.error is not None:
            raise self._responses.error
        if self.is_broken or self._responses.has_ended or self._requests is None:
            raise asyncio.InvalidStateError("the call is over")
        self.network.on_send(self._client, self.path, request)
        self._requests.send(self._take_request, type(request), request.SerializeToString())

    async def read(self) -> Any:
        data = await self._responses.next()
        if data is grpc.aio.EOF:
            return data
        response = self._deserialize(data)
        self.network.on_receive(self._client, self.path, response)
        return response

    async def done_writing(self) -> None:
        if self._requests is not None:
            self._requests.send(self._requests.end)

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> Any:
        response = await self.read()
        if response is grpc.aio.EOF:
            raise StopAsyncIteration
        return response

    def cancel(self) -> bool:
        """The client gives up: its handler is cancelled."""
        if not self.is_broken:
            self._responses.fail(rpc_error(grpc.StatusCode.CANCELLED))
            self._forget()
            if self._requests is not None:
                self._notify(self.ends[-1], self._stop)
        return True

    def break_off(self) -> None:
        """The connection breaks: both ends learn of it in a moment."""
        if self.is_broken:
            return
        self._forget()
        self._notify(self._client, self.fail, grpc.StatusCode.UNAVAILABLE)
        self._notify(self.ends[-1], self._stop)

    def fail(self, code: grpc.StatusCode, status: status_pb2.Status | None = None) -> None:
        """The client hears that the call failed."""
        self._forget()
        error = rpc_error(code, status)
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(error)
        self._responses.fail(error)

    def expire(self) -> None:
        """The deadline passed."""
        if not self.is_broken:
            self.fail(grpc.StatusCode.DEADLINE_EXCEEDED)
            self._notify(self.ends[-1], self._stop)

    def _forget(self) -> None:
        self.is_broken = True
        self.network.calls.pop(self, None)

    def _notify(self, process: Process, hear: Callable[..., None], *args: Any) -> None:
        delay = NOTICE_SECONDS * self.network.rng.random()
        self.network.loop.call_later(delay, hear, *args, context=process.context)

    def _take_request(self, kind: Any, data: bytes) -> None:
        assert self._requests is not None, "requests come after the call was opened"
        self._requests.push(kind.FromString(data))

    def _serve(self) -> None:
        self._start(self._answer_stream)

    def _serve_one(self, kind: Any, data: bytes) -> None:
        self._start(partial(self._answer_one, kind.FromString(data)))

    def _start(self, serve: Callable[[], Any]) -> None:
        context = self.ends[-1].context.copy()
        context.run(caller_variable.set, _caller(self._metadata))
        self._task = self.network.loop.create_task(serve(), context=context)

    def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _iterate(self) -> AsyncIterator[Any]:
        assert self._requests is not None, "as above"
        while (request := await self._requests.next()) is not grpc.aio.EOF:
            yield request

    async def _answer_stream(self) -> None:
        assert self._requests is not None, "as above"
        try:
            async with background() as tasks:
                call_tasks.set(tasks)
                is_unary = self.path.endswith("ClaimRuns")
                requests: Any = await self._requests.next() if is_unary else self._iterate()
                responses = self._method(requests, None)
                try:
                    async for response in responses:
                        self._respond(response)
                finally:
                    await responses.aclose()
        except (MainspringError, BaseExceptionGroup) as error:
            self._finish(_first(error))
            return
        self._responses.send(self._end)

    async def _answer_one(self, request: Any) -> None:
        try:
            response = await self._method(request, None)
        except MainspringError as error:
            self._finish(error)
            return
        self.network.on_send(self.ends[-1], self.path, response)
        self._responses.send(self._resolve, response.SerializeToString())

    def _respond(self, response: Any) -> None:
        if not self.is_broken:
            self.network.on_send(self.ends[-1], self.path, response)
            self._responses.send(self._responses.push, response.SerializeToString())

    def _resolve(self, data: bytes) -> None:
        self._forget()
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(self._deserialize(data))

    def _end(self) -> None:
        self._forget()
        self._responses.end()

    def _finish(self, error: BaseException) -> None:
        if isinstance(error, MainspringError):
            self._responses.send(self.fail, error.code, to_status(error))
        elif not isinstance(error, asyncio.CancelledError):
            self.network.on_fault(f"{self.path} broke: {error!r}")
            self._responses.send(self.fail, grpc.StatusCode.INTERNAL)


def rpc_error(code: grpc.StatusCode, status: status_pb2.Status | None = None) -> grpc.aio.AioRpcError:
    """What grpc.aio raises for a status."""
    details = () if status is None else (("grpc-status-details-bin", status.SerializeToString()),)
    message = code.name if status is None else status.message
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*details), details=message)


def as_user(user: UserExecutionContext) -> tuple[tuple[str, bytes], ...]:
    """Metadata of a call that a user makes with a credential of the user's own."""
    return ((USER_KEY, user.to_message().SerializeToString()),)


def _caller(metadata: dict[str, Any]) -> Caller:
    data = metadata.get(USER_KEY) or metadata.get(CONTEXT_KEY)
    context = None
    if data is not None:
        context = UserExecutionContext.from_message(identity_pb2.UserExecutionContext.FromString(data))
    if USER_KEY in metadata and context is not None:
        principal = Principal(
            "user", context.tenant_id, context.user_id, ("runner",), is_service=False, expire_time=1e12
        )
        return Caller(principal, context)
    return Caller(SERVICE, context)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
