"""The gateway's door: how many connections may stand there whose user is not known yet, and who is turned away."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, Final, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from mainspring_kit import telemetry
from mainspring_kit.errors import MainspringError, Reason
from mainspring_kit.identity import new_id

from mainspring_gateway.config import GatewaySettings
from mainspring_gateway.core.problems import CONTENT_TYPE, problem

_TURNED_AWAY_SECONDS: Final = 1


class Strangers:
    """The connections on which no request or hello has named a user so far, counted by the address they come from."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._peers: dict[object, str] = {}
        self._per_peer: Counter[str] = Counter()

    def enter(self, connection: object, peer: str) -> None:
        """Counts a new connection in; QUEUE_FULL at the bound of its peer or of the process."""
        settings = self._settings
        if self._per_peer[peer] >= settings.strangers_per_peer_max:
            raise _full("strangers of a peer", settings.strangers_per_peer_max)
        if len(self._peers) >= settings.strangers_max:
            raise _full("strangers", settings.strangers_max)
        self._peers[connection] = peer
        self._per_peer[peer] += 1

    def leave(self, connection: object) -> None:
        """Counts a connection out: its user is known, or it is gone."""
        peer = self._peers.pop(connection, None)
        if peer is not None:
            self._per_peer[peer] -= 1
            if not self._per_peer[peer]:
                del self._per_peer[peer]


class Visitor(web.RequestHandler):
    """aiohttp's own protocol, let in as a stranger or turned away. One class per connection is how aiohttp has it."""

    __slots__ = ("_strangers",)

    def __init__(self, server: web.Server, *, strangers: Strangers, **options: Any) -> None:  # Any: aiohttp's options
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self._strangers = strangers

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of asyncio: the connection stands."""
        try:
            self._strangers.enter(self, str((transport.get_extra_info("peername") or ("",))[0]))
        except MainspringError as error:
            _TurnedAway(cast(asyncio.Transport, transport), error)
        else:
            super().connection_made(transport)

    def log_exception(self, *args: Any, **options: Any) -> None:  # Any: as loggers have it
        """Of aiohttp: a fault. A body that is broken is none of ours, and what it says may be a secret."""
        if not isinstance(options.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **options)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Of asyncio: the connection is gone."""
        self._strangers.leave(self)
        super().connection_lost(exc)

    def _answer_error(self, request: web.BaseRequest, status: int = 500, *told: Any) -> web.StreamResponse:
        """Refuses what is no HTTP, and does not log it: it may hold a credential. `told`: aiohttp's error and text."""
        if not told or not isinstance(told[0], HttpProcessingError):
            return super().handle_error(request, status, *told)
        error = MainspringError(
            Reason.REQUEST_INVALID, "What was sent is no HTTP request: check its first line and its headers.", field=""
        )
        response = web.Response(body=problem(error, new_id()), status=error.http_status, content_type=CONTENT_TYPE)
        response.force_close()
        return response

    handle_error = _answer_error  # type: ignore[assignment]  # aiohttp's name for it; error and text are one argument


class _TurnedAway(asyncio.Protocol):
    """Answers whatever comes with an error, and closes."""

    def __init__(self, transport: asyncio.Transport, error: MainspringError) -> None:
        self._transport = transport
        self._error = error
        transport.set_protocol(self)
        self._timer = asyncio.get_running_loop().call_later(_TURNED_AWAY_SECONDS, transport.abort)
        telemetry.RPC_COUNT.labels("turned away", str(error.http_status)).inc()

    def data_received(self, data: bytes) -> None:
        """Of asyncio: a request, or the begin of one."""
        if not self._transport.is_closing():
            body = problem(self._error, new_id())
            head = (
                f"HTTP/1.1 {self._error.http_status} Too Many Requests\r\nContent-Type: {CONTENT_TYPE}\r\n"
                f"Content-Length: {len(body)}\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
            )
            self._transport.write(head.encode() + body)
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Of asyncio: the connection is gone."""
        self._timer.cancel()


def _full(queue: str, limit: int) -> MainspringError:
    return MainspringError(
        Reason.QUEUE_FULL,
        f"{limit} connections have not said who they are, and no more are let in: send a bearer at once, or try later.",
        queue=queue,
        limit=limit,
    )
