"""Whom the registry calls: execution, to start the runs of schedules."""

from __future__ import annotations

import grpc
from mainspring.v1 import execution_pb2, execution_pb2_grpc
from mainspring_kit.channel import Peer
from mainspring_kit.errors import from_rpc_error
from mainspring_kit.identity import UserExecutionContext


class Execution:
    """Execution as the registry uses it."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._stub = execution_pb2_grpc.ExecutionServiceStub(peer.channel)

    async def start_run(
        self, user: UserExecutionContext, request: execution_pb2.StartRunRequest
    ) -> execution_pb2.StartRunResponse:
        """Starts a run for a user; raises what execution says."""
        try:
            return await self._stub.StartRun(request, **self._peer.call(user))
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
