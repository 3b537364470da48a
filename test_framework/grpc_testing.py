"""gRPC servers for contract tests: grpc.aio with the kit's guard behind the synchronous face of pytest-grpc."""

from __future__ import annotations

import importlib
import socket
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from mainspring_kit.channel import MESSAGE_BYTES_MAX, METADATA_BYTES_MAX
from mainspring_kit.errors import DOMAIN
from mainspring_kit.identity import TokenVerifier
from mainspring_kit.interceptors import Guard

from test_framework.loop_thread import LoopThread

# The kit's; two servers on one port would share it in silence.
SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_metadata_size", METADATA_BYTES_MAX),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
)


class ErrorParts(NamedTuple):
    """What a client can tell an error by."""

    code: grpc.StatusCode
    reason: str
    metadata: dict[str, str]


def error_of(error: grpc.RpcError) -> ErrorParts:
    """Unpacks a failed call (sync or aio); fails unless it carries exactly one ErrorInfo of ours."""
    status = rpc_status.from_call(error)
    assert status is not None, f"{error.code().name} came without google.rpc.Status: {error.details()}"
    infos = [detail for detail in status.details if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
    assert len(infos) == 1, f"{error.code().name} carries {len(infos)} ErrorInfo details: {error.details()}"
    info = error_details_pb2.ErrorInfo.FromString(infos[0].value)
    assert info.domain == DOMAIN, f"the ErrorInfo's domain is {info.domain!r}"
    assert status.code == error.code().value[0] and status.message == error.details()
    return ErrorParts(error.code(), info.reason, dict(info.metadata))


def violations_of(error: grpc.RpcError) -> dict[str, str]:
    """The BadRequest detail of a failed call: field to description; empty where there is none."""
    status = rpc_status.from_call(error)
    assert status is not None
    found: dict[str, str] = {}
    for detail in status.details:
        if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            for fault in error_details_pb2.BadRequest.FromString(detail.value).field_violations:
                found[fault.field] = fault.description
    return found


def free_address() -> str:
    """`127.0.0.1:port` with a port that was free a moment ago."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


# Any below: generated stubs and servicers have no common base.
def stub_class(service: str) -> Any:
    """The generated stub of `State`, `Registry`, `Dispatcher` or `Execution`."""
    return getattr(_generated(service), f"{service}ServiceStub")


def add_to_server(servicers: Mapping[str, Any], server: Any) -> None:
    """Adds servicers by their service's name, with the generated functions."""
    for service, servicer in servicers.items():
        getattr(_generated(service), f"add_{service}ServiceServicer_to_server")(servicer, server)


def _generated(service: str) -> Any:
    return importlib.import_module(f"mainspring.v1.{service.lower()}_pb2_grpc")


def descriptor_of(full_name: str) -> ServiceDescriptor:
    """The descriptor of a service of ours by its full name, e.g. `mainspring.v1.StateService`."""
    service = full_name.rpartition(".")[2].removesuffix("Service")
    contract = importlib.import_module(f"mainspring.v1.{service.lower()}_pb2")
    descriptor: ServiceDescriptor = contract.DESCRIPTOR.services_by_name[f"{service}Service"]
    return descriptor


class AioServerFacade:
    """What pytest-grpc takes for its server: gathers what is added, then serves it on the loop with the real guard."""

    def __init__(self, loop: LoopThread, verifier: TokenVerifier) -> None:
        self._loop = loop
        self._verifier = verifier
        self._generic: list[Sequence[grpc.GenericRpcHandler]] = []
        self._registered: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}
        self._addresses: list[str] = []
        self._server: grpc.aio.Server | None = None

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """As grpc.Server's."""
        self._generic.append(handlers)

    def add_registered_method_handlers(
        self, service_name: str, handlers: dict[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """As grpc.Server's."""
        self._registered[service_name] = handlers

    def add_insecure_port(self, address: str) -> None:
        """As grpc.Server's."""
        self._addresses.append(address)

    def start(self) -> None:
        """Builds the server on the loop and starts it."""
        self._loop.run(self._start())

    def stop(self, grace: float | None = None) -> None:
        """Stops the server; calls under way get `grace` seconds, or are cancelled at once, as grpc.Server does."""
        if self._server is not None:
            self._loop.run(self._server.stop(grace))
            self._server = None

    async def _start(self) -> None:
        guard = Guard([descriptor_of(name) for name in self._registered], self._verifier)
        server = grpc.aio.server(interceptors=[guard], options=SERVER_OPTIONS)
        for generic in self._generic:
            server.add_generic_rpc_handlers(generic)
        for service_name, handlers in self._registered.items():
            server.add_registered_method_handlers(service_name, handlers)
        for address in self._addresses:
            server.add_insecure_port(address)
        await server.start()
        self._server = server
