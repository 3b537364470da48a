"""What the contract tests of the registry share: how it is wired, and requests that are right until changed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from mainspring.v1 import registry_pb2 as pb
from mainspring.v1 import types_pb2
from mainspring_registry.__main__ import wired
from mainspring_registry.config import RegistrySettings
from mainspring_registry.servicer import RegistryServicer

from test_framework.identities import Metadata
from test_framework.waiting import wait_until

TIMEOUT = 20
SCHEMA = b'{"type": "object"}'

# Any: the environment is what settings take.
Wiring = Callable[[], AbstractAsyncContextManager[Mapping[str, RegistryServicer]]]


def wiring(environment: dict[str, Any]) -> Wiring:
    """The wiring of a module whose `grpc_service` is the registry."""

    @asynccontextmanager
    async def wire() -> AsyncIterator[Mapping[str, RegistryServicer]]:
        async with wired(RegistrySettings(**environment)) as (servicer, _):
            yield {"Registry": servicer}

    return wire


def agent(name: str, **changes: object) -> pb.RegisterAgentRequest:
    """The registration of a right specification, with changes."""
    spec = {
        "apiVersion": "mainspring/v1",
        "kind": "Agent",
        "name": name,
        "model": {"provider": "scripted", "script": [{"result": 1}]},
        **changes,
    }
    return pb.RegisterAgentRequest(document=json.dumps(spec).encode())


def tool(
    name: str, description: str = "", *, effect: types_pb2.EffectClass.ValueType = types_pb2.EFFECT_CLASS_PURE
) -> types_pb2.Tool:
    """A right declaration."""
    return types_pb2.Tool(name=name, description=description, input_schema=SCHEMA, effect=effect)


# Any: generated stubs have no common base.
async def register_tool(stub: Any, metadata: Metadata, declared: types_pb2.Tool) -> None:
    """Registers a tool through a stub of grpc.aio."""
    await stub.RegisterTools(pb.RegisterToolsRequest(tools=[declared]), metadata=metadata, timeout=TIMEOUT)


# Any: asyncpg's connections are generic for checkers only.
async def until_blocked(owner: Any) -> None:
    """Until a statement of the registry waits for a lock that the owner holds."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND usename = 'mainspring_registry'"
    await wait_until(lambda: owner.fetchval(waiting), what="a statement of the registry waits for the lock")
