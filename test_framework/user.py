"""A user of the platform in a test: a context of its own, and the ways in by socket, HTTP and gRPC."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import Any

import aiohttp
import grpc

from test_framework.agents import Spec
from test_framework.grpc_testing import stub_class
from test_framework.identities import Metadata, UserExecutionContext
from test_framework.stack import Stack
from test_framework.websocket_client import StreamClient, open_stream

HTTP_SECONDS = 30.0
EVENTS_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer: the status, the bytes as they came, and the JSON in them."""

    status: int
    body: bytes
    json: Any  # Any: a JSON value


class User:
    """Everything it opens is closed by `close`."""

    def __init__(self, stack: Stack, context: UserExecutionContext) -> None:
        self.stack = stack
        self.context = context
        self.token = stack.identities.token(context.tenant_id, context.user_id)
        self._opened = AsyncExitStack()
        self._session: aiohttp.ClientSession | None = None
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def close(self) -> None:
        """Closes sockets, connections and channels."""
        await self._opened.aclose()
        self._session = None
        self._channels = {}

    async def __aenter__(self) -> User:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.close()

    def stream(self, gateway: str = "") -> AbstractAsyncContextManager[StreamClient]:
        """A socket that the caller closes by leaving the block; `gateway` is the URL of one replica."""
        return open_stream(gateway or self.stack.gateway, self.token)

    async def open_stream(self) -> StreamClient:
        """A socket that lives as long as the user."""
        return await self._opened.enter_async_context(self.stream())

    async def http(
        self, method: str, path: str, body: object = None, *, role: str = "", headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One HTTP call with the user's token, or with one of another role."""
        token = self.stack.identities.token(self.context.tenant_id, self.context.user_id, role) if role else self.token
        session = await self._http_session()
        sent = {"Authorization": f"Bearer {token}", **(headers or {})}
        async with session.request(method, f"{self.stack.gateway}{path}", json=body, headers=sent) as response:
            raw = await response.read()
            kind = response.content_type
            return Answer(response.status, raw, await response.json(content_type=None) if "json" in kind else None)

    async def register(self, *specs: Spec) -> None:
        """Registers agents in the user's tenant, as its operator."""
        for spec in specs:
            answer = await self.http("POST", "/v1/agents", spec, role="operator")
            assert answer.status in (200, 201), f"{spec['name']} was refused with {answer.status}: {answer.body!r}"

    async def get_run(self, run_id: str) -> Mapping[str, Any]:
        """The run as HTTP shows it."""
        answer = await self.http("GET", f"/v1/runs/{run_id}")
        assert answer.status == 200, f"run {run_id}: {answer.status} {answer.body!r}"
        run: Mapping[str, Any] = answer.json
        return run

    async def grpc_stub(self, service: str, replica: int = 0) -> Any:
        """The stub of `State`, `Registry`, `Dispatcher` or `Execution`; Any: stubs have no common base."""
        address = self.stack.services[service.lower()][replica]
        if address not in self._channels:
            self._channels[address] = await self._opened.enter_async_context(grpc.aio.insecure_channel(address))
        return stub_class(service)(self._channels[address])

    def metadata(self) -> Metadata:
        """The metadata of the user's own gRPC calls."""
        return (("authorization", f"Bearer {self.token}"),)

    async def _http_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=HTTP_SECONDS)
            self._session = await self._opened.enter_async_context(aiohttp.ClientSession(timeout=timeout))
        return self._session
