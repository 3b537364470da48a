"""What the contract tests of the dispatcher share: its wiring beside a real registry, callers, and workers by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
from mainspring.tool import declare, is_tool
from mainspring.v1 import dispatcher_pb2 as pb
from mainspring.v1 import dispatcher_pb2_grpc as rpc
from mainspring.v1 import types_pb2
from mainspring.worker import Worker
from mainspring_dispatcher.__main__ import wired
from mainspring_dispatcher.config import DispatcherSettings
from mainspring_kit.channel import MESSAGE_BYTES_MAX
from mainspring_kit.identity import new_id
from mainspring_registry.__main__ import wired as registry_wired
from mainspring_registry.config import RegistrySettings

from test_framework.identities import Identities, Metadata, make_context
from test_framework.servers import Database
from test_framework.waiting import wait_until

TIMEOUT = 20
BEAT_SECONDS = 0.5
OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
)
PURE = types_pb2.EFFECT_CLASS_PURE
UNSAFE = types_pb2.EFFECT_CLASS_UNSAFE
OK = types_pb2.TOOL_STATUS_OK

# Any: servicers have no common base, settings take what they know.
Wiring = Callable[[], AbstractAsyncContextManager[Mapping[str, Any]]]


def wiring(environment: dict[str, Any], databases: Mapping[str, Database]) -> Wiring:
    """The dispatcher and the registry that it asks, on one server."""
    registry = {**environment, "database_url": databases["Registry"].service_urls["Registry"]}

    @asynccontextmanager
    async def wire() -> AsyncIterator[Mapping[str, Any]]:
        async with AsyncExitStack() as stack:
            registry_servicer, _ = await stack.enter_async_context(registry_wired(RegistrySettings(**registry)))
            dispatcher, _ = await stack.enter_async_context(wired(DispatcherSettings(**environment)))
            yield {"Registry": registry_servicer, "Dispatcher": dispatcher}

    return wire


def tool(name: str, *, effect: types_pb2.EffectClass.ValueType = PURE) -> types_pb2.Tool:
    """A right declaration."""
    return types_pb2.Tool(name=name, input_schema=b'{"type": "object"}', effect=effect)


def make_call(
    name: str,
    *,
    tenant: str,
    call_id: str = "",
    arguments: bytes = b"{}",
    effect: types_pb2.EffectClass.ValueType = PURE,
    seconds: float = 0,
) -> pb.ToolCall:
    """A right call."""
    call = pb.ToolCall(call_id=call_id or new_id(), tool=name, arguments=arguments, effect=effect, attempt=1)
    call.context.CopyFrom(make_context(tenant).to_message())
    if seconds:
        call.timeout.FromNanoseconds(int(seconds * 1e9))
    return call


class CallStream:
    """A caller's stream: sends calls, waits for their outcomes. Each item must be answered once."""

    def __init__(self, stub: Any, metadata: Metadata) -> None:  # Any: generated stubs have no common base
        self.call = stub.CallTools(metadata=metadata)
        self._next_item_id = 1
        self._answers: dict[int, pb.ToolResult] = {}

    async def send(self, *calls: pb.ToolCall) -> list[int]:
        """Sends them in one frame and answers their item ids."""
        for call in calls:
            call.item_id = self._next_item_id
            self._next_item_id += 1
        await self.call.write(pb.CallToolsRequest(calls=calls))
        return [call.item_id for call in calls]

    async def outcomes(self, item_ids: Sequence[int]) -> list[pb.ToolResult]:
        """Waits until all of them are answered."""
        async with asyncio.timeout(TIMEOUT):
            while not set(item_ids) <= set(self._answers):
                frame = await self.call.read()
                assert isinstance(frame, pb.CallToolsResponse), "the stream ended before all was answered"
                for result in frame.results:
                    assert result.item_id not in self._answers, "answered twice"
                    self._answers[result.item_id] = result
        return [self._answers[item_id] for item_id in item_ids]

    async def ask(self, *calls: pb.ToolCall) -> list[pb.ToolResult]:
        """Sends and waits."""
        return await self.outcomes(await self.send(*calls))

    async def ask_one(self, call: pb.ToolCall) -> pb.ToolResult:
        """Sends one call and waits for its outcome."""
        return (await self.ask(call))[0]


class HandWorker:
    """A worker written by hand: what it is sent is there to be looked at, and it answers when the test says so."""

    def __init__(self, stub: Any, metadata: Metadata, hello: pb.AttachHello) -> None:  # Any: as above
        self.stream = stub.Attach(metadata=metadata)
        self.hello = hello
        self.registered: list[types_pb2.Tool] = []
        self.calls: list[pb.WorkerCall] = []
        self.cancelled: list[int] = []
        self.told_to_drain = False

    async def attach(self) -> None:
        """Sends the hello and waits for the answer."""
        await self.stream.write(pb.AttachRequest(hello=self.hello))
        async with asyncio.timeout(TIMEOUT):
            frame = await self.stream.read()
        assert isinstance(frame, pb.AttachResponse)
        self.registered = list(frame.registered)

    async def read(self) -> bool:
        """Takes one frame; False: the stream has ended. Raises what it ended with."""
        frame = await self.stream.read()
        if not isinstance(frame, pb.AttachResponse):
            return False
        self.calls.extend(frame.calls)
        self.cancelled.extend(frame.cancel_dispatch_ids)
        self.told_to_drain = self.told_to_drain or frame.draining
        return True

    async def until(self, condition: Callable[[], object]) -> None:
        """Reads, and beats, until the condition holds."""
        async with asyncio.timeout(TIMEOUT):
            while not condition():
                reading = asyncio.ensure_future(self.read())
                while not (await asyncio.wait({reading}, timeout=BEAT_SECONDS))[0]:
                    await self.stream.write(pb.AttachRequest(in_flight=len(self.calls)))
                assert await reading

    async def next_call(self) -> pb.WorkerCall:
        """Waits for one more call than there were answered and takes it."""
        await self.until(lambda: self.calls)
        return self.calls.pop(0)

    async def finish(self, call: pb.WorkerCall, result: bytes = b"1") -> None:
        """Returns a result."""
        done = pb.WorkerResult(dispatch_id=call.dispatch_id, status=OK, result=result)
        await self.stream.write(pb.AttachRequest(results=[done]))

    async def leave(self) -> None:
        """Says goodbye and waits for the end of the stream."""
        await self.stream.write(pb.AttachRequest(draining=True))
        await self.stream.done_writing()
        async with asyncio.timeout(TIMEOUT):
            while await self.read():
                pass

    def break_off(self) -> None:
        """Is gone without a word."""
        self.stream.cancel()


class Desk:
    """Callers and workers at one dispatcher, all of a test's own."""

    def __init__(self, address: str, identities: Identities) -> None:
        self.address = address
        self.identities = identities
        self.channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self.stub: Any = rpc.DispatcherServiceStub(self.channel)  # Any: generated stubs have no common base
        self._streams: list[Any] = []

    def calls(self) -> CallStream:
        """A new stream of calls."""
        stream = CallStream(self.stub, self.identities.service_metadata())
        self._streams.append(stream.call)
        return stream

    def hand_worker(
        self,
        *tools: types_pb2.Tool,
        tenant: str = "",
        worker_id: str = "",
        concurrency: int = 10,
        knows: Sequence[pb.WorkerCall] = (),
    ) -> HandWorker:
        """A worker by hand, not yet attached; without a tenant it has a service's credential."""
        hello = pb.AttachHello(
            worker_id=worker_id or new_id(),
            tools=tools,
            concurrency=concurrency,
            known_dispatch_ids=[call.dispatch_id for call in knows],
        )
        worker = HandWorker(self.stub, self.metadata(tenant), hello)
        self._streams.append(worker.stream)
        return worker

    async def attached(
        self,
        *tools: types_pb2.Tool,
        tenant: str = "",
        worker_id: str = "",
        concurrency: int = 10,
        knows: Sequence[pb.WorkerCall] = (),
    ) -> HandWorker:
        """A worker by hand, attached."""
        worker = self.hand_worker(*tools, tenant=tenant, worker_id=worker_id, concurrency=concurrency, knows=knows)
        await worker.attach()
        return worker

    def metadata(self, tenant: str) -> Metadata:
        """An operator's of the tenant, or a service's."""
        return self.identities.metadata(tenant, "ann", "operator") if tenant else self.identities.service_metadata()

    @asynccontextmanager
    async def worker(self, *functions: Callable[..., Any], tenant: str = "", **options: Any) -> AsyncIterator[Worker]:
        """The SDK's own worker with these tools, attached; drained in the end. Any: a Worker's options."""
        assert all(is_tool(function) for function in functions)
        ready, stop = asyncio.Event(), asyncio.Event()
        worker = Worker(
            {declaration.name: declaration for declaration in map(declare, functions)},
            target=self.address,
            token=str(self.metadata(tenant)[0][1]).removeprefix("Bearer "),
            ready=ready.set,
            **options,
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(worker.run(stop))
            await wait_until(ready.is_set, what="the worker is attached")
            try:
                yield worker
            finally:
                stop.set()

    async def close(self) -> None:
        """Ends everything."""
        for stream in self._streams:
            stream.cancel()
        await self.channel.close()
