"""Connections to providers: one client of a provider's own SDK per address and key, shared by all runs."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import grpc
from mainspring_kit.errors import MainspringError, Reason

from mainspring_execution.models.endpoint import SILENT_SECONDS_MAX, Endpoint

CLIENTS_MAX: Final = 64
CONNECT_SECONDS: Final = 10.0

_CLIENTS: Final = {"openai": "AsyncOpenAI", "anthropic": "AsyncAnthropic"}


@dataclass(slots=True)
class _Kept:
    # The SDKs' clients have no base in common: Any.
    client: Any
    users: int = 0
    is_dropped: bool = False


class Clients:
    """Opens clients as they are needed and closes those that were not used for longest; `close` closes all."""

    def __init__(self, *, clients_max: int = CLIENTS_MAX) -> None:
        self._clients_max = clients_max
        # Those that are whole; a module is there before it is.
        self._sdks: dict[str, ModuleType] = {}
        self._kept: OrderedDict[tuple[str, str, bytes], _Kept] = OrderedDict()

    @asynccontextmanager
    async def use(self, endpoint: Endpoint, key: str) -> AsyncIterator[tuple[Any, ModuleType]]:
        """The client (Any: of either SDK) and its SDK, for one answer."""
        sdk = self._sdks.get(endpoint.provider)
        if sdk is None:
            sdk = self._sdks[endpoint.provider] = await load_sdk(endpoint.provider)
        address = (endpoint.provider, endpoint.base_url, hashlib.sha256(key.encode()).digest())
        kept = self._kept.get(address)
        if kept is None:
            kept = self._kept[address] = _Kept(_open(sdk, endpoint, key=key))
        self._kept.move_to_end(address)
        kept.users += 1
        try:
            while len(self._kept) > self._clients_max:
                await self._drop(next(iter(self._kept)))
            yield kept.client, sdk
        finally:
            kept.users -= 1
            if kept.is_dropped and not kept.users:
                await kept.client.close()

    async def close(self) -> None:
        """Closes every client that nobody uses any more."""
        while self._kept:
            await self._drop(next(iter(self._kept)))

    async def _drop(self, address: tuple[str, str, bytes]) -> None:
        kept = self._kept.pop(address)
        kept.is_dropped = True
        if not kept.users:
            await kept.client.close()


async def load_sdk(provider: str) -> ModuleType:
    """The provider's SDK. The first time takes seconds: in a thread, for leases have to be kept meanwhile."""
    try:
        return await asyncio.to_thread(importlib.import_module, provider)
    except ImportError as error:
        raise MainspringError(
            Reason.MODEL_FAILED,
            f"The SDK of the provider {provider} is not installed here: install mainspring[models] for the execution "
            "service.",
            code=grpc.StatusCode.FAILED_PRECONDITION,
            provider=provider,
        ) from error


def _open(sdk: ModuleType, endpoint: Endpoint, *, key: str) -> Any:
    """Any: of either SDK. Retries are the run's own; a redirect would carry the key to whoever is named there."""
    import httpx2  # comes with the SDKs, which need not be there

    http_client = sdk.DefaultAsyncHttpxClient(
        follow_redirects=False, timeout=httpx2.Timeout(SILENT_SECONDS_MAX, connect=CONNECT_SECONDS)
    )
    make = getattr(sdk, _CLIENTS[endpoint.provider])
    return make(api_key=key, base_url=endpoint.base_url or None, max_retries=0, http_client=http_client)
