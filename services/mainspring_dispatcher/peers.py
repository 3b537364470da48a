"""Whom the dispatcher calls: the registry, to register what workers serve and to know which tools exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from mainspring.v1 import registry_pb2, registry_pb2_grpc, types_pb2
from mainspring_kit.channel import Peer
from mainspring_kit.errors import MainspringError, Reason, from_rpc_error
from mainspring_kit.identity import UserExecutionContext


class Registry:
    """The registry as the dispatcher uses it."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._stub = registry_pb2_grpc.RegistryServiceStub(peer.channel)

    async def register(
        self, tools: Sequence[types_pb2.Tool], context: UserExecutionContext | None
    ) -> list[types_pb2.Tool]:
        """Registers a worker's tools for the context's tenant, or for everybody; TOOL_CONFLICT, REQUEST_INVALID."""
        request = registry_pb2.RegisterToolsRequest(tools=tools)
        try:
            answer = await self._stub.RegisterTools(request, **self._peer.call(context))
        except grpc.aio.AioRpcError as failed:
            error = from_rpc_error(failed)
            if not error.metadata and error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                # Its deadline is ours, not the worker's.
                message = "The registry did not answer: attach again."
                error = MainspringError(Reason.PEER_UNAVAILABLE, message, peer="registry")
            raise error from failed
        return list(answer.tools)

    def watch(self, after_revision: int) -> grpc.aio.UnaryStreamCall[Any, Any]:  # Any: as grpc's own stubs
        """The stream of the catalogue's changes."""
        request = registry_pb2.WatchCatalogRequest(after_revision=after_revision)
        return self._stub.WatchCatalog(request, **self._peer.stream())
