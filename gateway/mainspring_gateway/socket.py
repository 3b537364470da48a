"""One WebSocket client: its opening, its frames in, its end. What it may ask is the conversation's."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from aiohttp import WSMsgType, hdrs, web
from mainspring_kit import telemetry
from mainspring_kit.errors import MainspringError, Reason
from mainspring_kit.identity import Principal, new_id

from mainspring_gateway import access, metrics
from mainspring_gateway.config import GatewaySettings
from mainspring_gateway.conversation import Conversation
from mainspring_gateway.core import commands
from mainspring_gateway.core.frames import PING_FRAME, FrameId, error_frame, pong_frame, reply
from mainspring_gateway.gateway import BEGUN, GATEWAY, Gateway, slow_consumer
from mainspring_gateway.outgoing import Outgoing

SUBPROTOCOL: Final = "mainspring.v1.json"

_CLOSE_INTERNAL: Final = 1011
_CLOSE_UNAUTHENTICATED: Final = 4401
_CLOSE_SILENT: Final = 4408


async def stream(request: web.Request) -> web.WebSocketResponse:
    """`GET /v1/stream`: serves one WebSocket to its end."""
    gateway = request.app[GATEWAY]
    if request.headers.get(hdrs.UPGRADE, "").strip().lower() != "websocket":
        raise MainspringError(
            Reason.REQUEST_INVALID, "This path speaks WebSocket: send the upgrade headers.", field="Upgrade"
        )
    ws = make_websocket(gateway.settings)
    writer = await ws.prepare(request)
    request[BEGUN] = ws
    if writer is not None and request.transport is not None:
        socket = Socket(request, ws, gateway=gateway)
        outgoing = Outgoing(
            request.transport,
            writer,
            flusher=gateway.flusher,
            bytes_max=gateway.settings.queue_bytes_max,
            frames_max=gateway.settings.queue_frames_max,
            on_slow=lambda: socket.shut(slow_consumer(gateway.settings.queue_bytes_max)),
        )
        transport = request.transport
        await socket.serve(outgoing)
        # A graceful end alone would keep for ever what the client does not read.
        asyncio.get_running_loop().call_later(gateway.settings.close_seconds, transport.abort)
    return ws


def make_websocket(settings: GatewaySettings) -> web.WebSocketResponse:
    """How the gateway speaks the protocol. No compression: a frame is made once for all its watchers."""
    return web.WebSocketResponse(
        protocols=(SUBPROTOCOL,),
        compress=False,
        autoping=False,  # pings are answered by the socket, to be seen as signs of life
        decode_text=False,
        timeout=settings.close_seconds,
        max_msg_size=settings.frame_bytes_max + 1,
    )


class Socket:
    """A client's connection, from the upgrade to the close frame."""

    def __init__(self, request: web.Request, ws: web.WebSocketResponse, *, gateway: Gateway) -> None:
        self.connection_id = new_id()
        self._request = request
        self._ws = ws
        self._gateway = gateway
        self._conversation: Conversation | None = None
        self._outgoing: Outgoing | None = None
        # Ended early by `shut`: this task alone reads and closes.
        self._life = asyncio.timeout(None)
        self._end: MainspringError | None = None
        self._is_silent = False
        self._is_over = False
        self._heard_time = time.monotonic()
        # When the ping was sent that nothing has come after; 0: there is none.
        self._ping_time = 0.0

    async def serve(self, outgoing: Outgoing) -> None:
        """Talks with the client until one of the two ends it."""
        self._outgoing = outgoing
        try:
            async with self._life:
                if await self._open(outgoing):
                    await self._converse(outgoing)
        except TimeoutError:
            if self._end is None and not self._is_silent:
                raise
        except MainspringError as error:
            self._end = self._end or error
        finally:
            self._is_over = True
            if self._conversation is not None:
                self._conversation.leave()
                self._gateway.connections.leave(self, self._conversation.principal)
        await self._close(outgoing)

    def beat(self, monotonic_time: float, wall_time: float) -> None:
        """Pings a silent client; lets go one that stays silent or whose token has expired."""
        heartbeat_seconds = self._gateway.settings.heartbeat_seconds
        if self._conversation is not None and self._conversation.principal.expire_time <= wall_time:
            self.shut(self._conversation.principal.expired())
        elif self._ping_time:
            if monotonic_time - self._ping_time > heartbeat_seconds:
                self._is_silent = True
                self._cut()
        elif monotonic_time - self._heard_time > heartbeat_seconds and self._outgoing is not None:
            self._ping_time = monotonic_time
            self._outgoing.send(PING_FRAME)

    def shut(self, error: MainspringError) -> None:
        """Ends the conversation with an error."""
        if self._end is None:
            self._end = error
            self._cut()

    def _cut(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._life.reschedule(asyncio.get_running_loop().time())

    async def _open(self, outgoing: Outgoing) -> bool:
        """Admits the client, or raises why not. False: it went away by itself."""
        settings, headers = self._gateway.settings, self._request.headers
        if hdrs.SEC_WEBSOCKET_PROTOCOL in headers and self._ws.ws_protocol is None:
            offered = headers[hdrs.SEC_WEBSOCKET_PROTOCOL][:128]
            raise MainspringError(
                Reason.SUBPROTOCOL_REFUSED,
                f"{offered} is not spoken here: offer {SUBPROTOCOL}, or none.",
                offered=offered,
            )
        access.check_origin(headers.get(hdrs.ORIGIN), host=self._request.host, allowed=settings.origins)
        self._gateway.refuse_when_draining()
        frame_id: FrameId = None
        if hdrs.AUTHORIZATION in headers:
            principal = access.authenticate(self._gateway.verifier, headers)
        elif "ticket" in self._request.query:
            raise MainspringError(
                Reason.NOT_IMPLEMENTED,
                "Tickets are part of the protocol but not of this release: send a bearer header, or a hello.",
                method="ticket",
            )
        else:
            hello = await self._receive_hello(outgoing)
            if hello is None:
                return False
            frame_id, principal = hello.frame_id, access.verify_user(self._gateway.verifier, hello.token)
        self._gateway.strangers.leave(self._request.protocol)
        self._gateway.connections.admit(self, principal)
        self._conversation = Conversation(principal, outgoing, gateway=self._gateway)
        outgoing.send(self._welcome(principal, frame_id))
        return True

    async def _receive_hello(self, outgoing: Outgoing) -> commands.Hello | None:
        seconds = self._gateway.settings.hello_seconds
        try:
            async with asyncio.timeout(seconds):
                data = await self._receive(outgoing)
        except TimeoutError as error:
            raise MainspringError(
                Reason.HELLO_MISSING,
                f'No credential came within {seconds:g} s: send {{"op":"hello","token":"…"}} first.',
                seconds=seconds,
            ) from error
        if data is None:
            return None
        fields = commands.decode_object(data)
        command = commands.read_command(fields) if fields.get("op") == "hello" else None
        if not isinstance(command, commands.Hello):
            raise MainspringError(
                Reason.TOKEN_MISSING, 'Without a header the first frame must be {"op":"hello","token":"…"}.'
            )
        return command

    def _welcome(self, principal: Principal, frame_id: FrameId) -> bytes:
        settings = self._gateway.settings
        telemetry.logger().info(
            "socket_opened",
            connection_id=self.connection_id,
            tenant_id=principal.tenant_id,
            user_id=principal.user_id,
        )
        return reply(
            "welcome",
            frame_id,
            connection_id=self.connection_id,
            tenant_id=principal.tenant_id,
            user_id=principal.user_id,
            heartbeat_seconds=int(seconds) if (seconds := settings.heartbeat_seconds).is_integer() else seconds,
            limits={
                "frame_bytes": settings.frame_bytes_max,
                "queue_bytes": settings.queue_bytes_max,
                "queue_frames": settings.queue_frames_max,
                "followed_runs": settings.followed_runs_max,
                "connections": settings.sockets_per_user_max,
            },
        )

    async def _converse(self, outgoing: Outgoing) -> None:
        """Does what frame after frame asks. A frame that can't be read ends the conversation, a wrong one does not."""
        conversation = self._conversation
        while conversation is not None and (data := await self._receive(outgoing)) is not None:
            fields = commands.decode_object(data)
            try:
                conversation.obey(commands.read_command(fields))
            except MainspringError as error:
                outgoing.send(error_frame(commands.frame_id_of(fields), error))

    async def _receive(self, outgoing: Outgoing) -> bytes | None:
        """The next text message; None when the client is gone."""
        while True:
            message = await self._ws.receive()
            self._heard_time = time.monotonic()
            self._ping_time = 0.0
            if message.type is WSMsgType.TEXT:
                data: bytes = message.data
                return data
            if message.type is WSMsgType.PING:
                outgoing.send(pong_frame(bytes(message.data)))
            elif message.type is WSMsgType.BINARY:
                raise MainspringError(
                    Reason.REQUEST_INVALID, "Binary frames are not read here: send JSON in text frames.", field=""
                )
            elif message.type is not WSMsgType.PONG:
                return None

    async def _close(self, outgoing: Outgoing) -> None:
        """Tells the client why, then closes; a client that went first is only logged."""
        code, reason = self._ws.close_code or 0, ""
        if self._end is not None:
            if self._end.rule is Reason.SLOW_CONSUMER:
                metrics.SLOW_CONSUMERS.inc()
            other_code = _CLOSE_UNAUTHENTICATED if self._conversation is None else _CLOSE_INTERNAL
            code, reason = self._end.close_code or other_code, self._end.reason_name
            outgoing.stop(error_frame(None, self._end))
        elif self._is_silent:
            code, reason = _CLOSE_SILENT, "HEARTBEAT_MISSED"
        if reason:
            await self._ws.close(code=code, message=reason.encode(), drain=False)
        telemetry.logger().info("socket_closed", connection_id=self.connection_id, code=code, reason=reason)
