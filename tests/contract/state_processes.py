"""More state processes over one database, for the contract tests of state."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from mainspring.v1 import state_pb2, state_pb2_grpc
from mainspring_kit import server
from mainspring_state.__main__ import wired
from mainspring_state.config import StateSettings

from test_framework.grpc_testing import free_address
from tests.contract.state_calls import TIMES


@asynccontextmanager
async def serving(environment: dict[str, Any], **changes: Any) -> AsyncIterator[str]:
    """Serves one more process's worth of service while the block runs; its address. `changes` (Any) are settings."""
    address = free_address()
    settings = StateSettings(**{**environment, **TIMES, "listen": address, "drain_seconds": 5.0, **changes})
    service = state_pb2.DESCRIPTOR.services_by_name["StateService"]
    add = state_pb2_grpc.add_StateServiceServicer_to_server
    async with (
        wired(settings) as (servicer, engine),
        server.serving(settings, [server.Service(service, add, servicer)], ready=lambda: engine.is_ready),
    ):
        yield address
        engine.drain()
