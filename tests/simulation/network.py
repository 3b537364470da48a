"""gRPC without a network: channels whose messages take time, stay in order per call, and are lost when it breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from random import Random
from typing import Any, Final, cast

import grpc
from mainspring.v1 import state_pb2_grpc

from tests.simulation.calls import Call
from tests.simulation.loop import PROCESS, Process, SimLoop

# Any in this module: generated stubs and servicers are generic over messages that only they know.

NO_INSTANCE_SECONDS: Final = 0.1


class Network:
    """Who is where, how long messages take, and which calls are under way."""

    def __init__(self, loop: SimLoop, rng: Random) -> None:
        self.loop = loop
        self.rng = rng
        self.hosts: dict[str, Host] = {}
        self.calls: dict[Call, None] = {}
        self.latency = rng.choice((0.0002, 0.001, 0.005))
        self.is_rough = True
        self.spike_share = rng.choice((0.0, 0.01, 0.05))
        self.on_send: Callable[[Process, str, Any], None] = lambda process, path, message: None
        self.on_receive: Callable[[Process, str, Any], None] = lambda process, path, message: None
        self.on_fault: Callable[[str], None] = lambda text: None

    def delay(self) -> float:
        """How long one message takes: mostly little, now and then long enough that much happens meanwhile."""
        draw = self.rng.random()
        if draw < self.spike_share and self.is_rough:
            return self.rng.random() ** 3 * 3.0
        return self.latency * (0.2 + draw)

    def channel(self, target: str, *, options: object = ()) -> Channel:
        """What `grpc.aio.insecure_channel` gives: a channel of the process that asks."""
        return Channel(self, PROCESS.get(), target.removeprefix("ipv4:").split(","))

    def state_stub(self, target: str) -> Any:
        """A stub of state for the process that asks."""
        return state_pb2_grpc.StateServiceStub(cast(grpc.aio.Channel, self.channel(target)))

    def break_calls(self, process: Process, other: Process | None = None) -> None:
        """Breaks the calls of a process, all or those with another one."""
        for call in list(self.calls):
            if process in call.ends and (other is None or other in call.ends):
                call.break_off()


class Host:
    """An address, and the process that serves there now."""

    def __init__(self) -> None:
        self.process: Process | None = None
        self.servicers: dict[str, Any] = {}


class Channel:
    """One instance's or the balanced channel, as stubs use it."""

    def __init__(self, network: Network, client: Process, addresses: list[str]) -> None:
        self._network = network
        self._client = client
        self._addresses = addresses

    def unary_unary(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        return partial(self._call_unary, path, response_deserializer)

    def unary_stream(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        return partial(self._open, path, response_deserializer)

    def stream_stream(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        return partial(self._open, path, response_deserializer, None)

    def stream_unary(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        return None

    async def close(self) -> None:
        return None

    def get_state(self, *, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return grpc.ChannelConnectivity.READY

    def _open(
        self, path: str, deserialize: Any, request: Any, *, metadata: Any = (), timeout: Any = None, **_: Any
    ) -> Call:
        call = Call(self._network, self._client, path, metadata=metadata, deserialize=deserialize)
        call.open(self._pick())
        if request is not None:
            call.send_request(request)
        return call

    def _call_unary(
        self, path: str, deserialize: Any, request: Any, *, metadata: Any = (), timeout: float = 5.0, **_: Any
    ) -> Awaitable[Any]:
        """The future of the one answer; it is asked again, as gRPC does, while the peer says UNAVAILABLE."""
        call = Call(self._network, self._client, path, metadata=metadata, deserialize=deserialize)
        answer: asyncio.Future[Any] = self._network.loop.create_future()
        call.answer = answer
        host = self._pick()
        if host is None:
            self._network.loop.call_later(min(timeout, NO_INSTANCE_SECONDS), call.fail, grpc.StatusCode.UNAVAILABLE)
            return answer
        call.open(host)
        call.send_request(request)
        timer = self._network.loop.call_later(timeout, call.expire)
        answer.add_done_callback(lambda _: timer.cancel())
        return answer

    def _pick(self) -> Host | None:
        hosts = [self._network.hosts[address] for address in self._addresses]
        alive = [host for host in hosts if host.servicers and host.process is not None and host.process.is_alive]
        return self._network.rng.choice(alive) if alive else None
