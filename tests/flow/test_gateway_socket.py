"""The WebSocket's opening, its frames and its ends, on a gateway alone: what holds whoever else is there."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from test_framework.identities import unique
from tests.flow.gateway_process import IDENTITIES, GatewayProcess, Socket, gateway_process

pytestmark = [pytest.mark.flow, pytest.mark.websocket]

SECONDS = 15
FRAME_BYTES_MAX = 65_536


# Any: each setting has a type of its own.
SETTINGS: dict[str, Any] = {
    "allowed_origins": "https://app.example",
    "hello_seconds": 1,
    "start_seconds": 1,
    "close_seconds": 1,
    "frame_bytes_max": FRAME_BYTES_MAX,
    "sockets_per_user_max": 2,
}


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    with gateway_process(**SETTINGS) as process:
        yield process


@pytest.fixture(scope="module")
def impatient_gateway() -> Iterator[GatewayProcess]:
    with gateway_process(heartbeat_seconds=1) as process:
        yield process


def token(user: str = "", **changes: Any) -> str:
    return IDENTITIES.token("acme", user or unique("person"), **changes)


async def ask(socket: Socket, frame: dict[str, Any] | str | None = None) -> dict[str, Any]:
    """Sends a frame, if any, and returns the next one that comes."""
    if frame is not None:
        await socket.send_str(frame if isinstance(frame, str) else json.dumps(frame))
    answer: dict[str, Any] = json.loads(await socket.receive_str(timeout=SECONDS))
    return answer


async def last_words(socket: Socket) -> tuple[str, int | None]:
    """The reason of the error frame that is the next to come, and the close code that follows it."""
    reason = (await ask(socket))["reason"]
    message = await socket.receive(timeout=SECONDS)
    assert message.type is aiohttp.WSMsgType.CLOSE, message
    return reason, socket.close_code


async def test_a_bearer_in_the_header_is_welcomed(gateway: GatewayProcess) -> None:
    async with gateway.open(token=token("ann")) as socket:
        assert socket.protocol == "mainspring.v1.json"
        welcome = await ask(socket)
        assert (welcome["op"], welcome["tenant_id"], welcome["user_id"]) == ("welcome", "acme", "ann")
        assert welcome["heartbeat_seconds"] == 25
        assert welcome["limits"]["frame_bytes"] == FRAME_BYTES_MAX
        assert welcome["connection_id"]


async def test_a_hello_is_welcomed(gateway: GatewayProcess) -> None:
    async with gateway.open(protocols=()) as socket:
        assert socket.protocol is None
        welcome = await ask(socket, {"op": "hello", "id": 1, "token": token("ann")})
        assert (welcome["op"], welcome["id"], welcome["user_id"]) == ("welcome", 1, "ann")


@pytest.mark.parametrize(
    ("frame", "reason", "code"),
    [
        ('{"op":"hello","token":"x"}', "TOKEN_INVALID", 4401),
        ('{"op":"hello"}', "REQUEST_INVALID", 4400),
        ('{"op":"start","agent":"a"}', "TOKEN_MISSING", 4401),
        ('{"op":"pause"}', "TOKEN_MISSING", 4401),
        ("no json", "REQUEST_INVALID", 4400),
    ],
)
async def test_any_other_first_frame_is_the_last(gateway: GatewayProcess, frame: str, reason: str, code: int) -> None:
    async with gateway.open() as socket:
        await socket.send_str(frame)
        assert await last_words(socket) == (reason, code)


async def test_a_hello_that_does_not_come_is_not_waited_for(gateway: GatewayProcess) -> None:
    async with gateway.open() as socket:
        assert await last_words(socket) == ("HELLO_MISSING", 4408)


async def test_a_ticket_is_not_taken_yet(gateway: GatewayProcess) -> None:
    async with gateway.open(query="?ticket=x") as socket:
        assert await last_words(socket) == ("NOT_IMPLEMENTED", 4401)


@pytest.mark.parametrize("credential", ["x", token(ttl_seconds=-1), IDENTITIES.service_metadata()[0][1]])
async def test_a_token_that_is_not_a_users_is_refused(gateway: GatewayProcess, credential: str) -> None:
    async with gateway.open(token=credential.removeprefix("Bearer ")) as socket:
        assert await last_words(socket) == ("TOKEN_INVALID", 4401)


async def test_another_subprotocol_is_refused(gateway: GatewayProcess) -> None:
    async with gateway.open(token=token(), protocols=("other.v1", "mainspring.v2.json")) as socket:
        assert await last_words(socket) == ("SUBPROTOCOL_REFUSED", 4406)
    async with gateway.open(token=token(), protocols=("other.v1", "mainspring.v1.json")) as socket:
        assert (await ask(socket))["op"] == "welcome"


async def test_only_known_pages_may_open_one(gateway: GatewayProcess) -> None:
    for origin in ("https://app.example", gateway.url):
        async with gateway.open(token=token(), origin=origin) as socket:
            assert (await ask(socket))["op"] == "welcome"
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        async with gateway.open(token=token(), origin=origin) as socket:
            assert await last_words(socket) == ("ORIGIN_REFUSED", 4403)


async def test_a_wrong_frame_is_answered_and_the_socket_stays(gateway: GatewayProcess) -> None:
    async with gateway.open(token=token()) as socket:
        await ask(socket)
        for frame, reason in (
            ({"op": "dance"}, "REQUEST_INVALID"),
            ({"op": "ping", "more": 1}, "REQUEST_INVALID"),
            ({"op": "start", "agent": "a", "input": [1]}, "REQUEST_INVALID"),
            ({"op": "start", "agent": "a", "user_id": "bob"}, "REQUEST_INVALID"),
            ({"op": "start", "agent": "a", "session_id": "default"}, "CONTEXT_INVALID"),
            ({"op": "follow", "run_id": "no-run"}, "RUN_NOT_FOUND"),
            ({"op": "follow", "scope": "user"}, "NOT_IMPLEMENTED"),
            ({"op": "approve", "approval_id": "a", "decision": "allow"}, "APPROVAL_NOT_FOUND"),
            ({"op": "signal", "run_id": "no-run", "name": "go"}, "RUN_NOT_FOUND"),
            ({"op": "resume", "run_id": "r", "reason": "why"}, "REQUEST_INVALID"),
            ({"op": "hello", "token": token()}, "REQUEST_INVALID"),
        ):
            answer = await ask(socket, {"id": "7", **frame})
            assert (answer["op"], answer["id"], answer["reason"]) == ("error", "7", reason), frame
        assert await ask(socket, {"op": "ping", "id": "8"}) == {"op": "pong", "id": "8"}


@pytest.mark.parametrize("frame", ["", "{", "[]", '{"op":"start","agent":"a","input":{"x":NaN}}', "\ud7ff"])
async def test_a_frame_that_is_no_object_ends_the_socket(gateway: GatewayProcess, frame: str) -> None:
    async with gateway.open(token=token()) as socket:
        await ask(socket)
        await socket.send_str(frame)
        assert await last_words(socket) == ("REQUEST_INVALID", 4400)


async def test_a_binary_frame_ends_the_socket(gateway: GatewayProcess) -> None:
    async with gateway.open(token=token()) as socket:
        await ask(socket)
        await socket.send_bytes(b'{"op":"ping"}')
        assert await last_words(socket) == ("REQUEST_INVALID", 4400)


async def test_a_frame_may_be_as_large_as_was_said_and_no_larger(gateway: GatewayProcess) -> None:
    async with gateway.open(token=token()) as socket:
        limit = (await ask(socket))["limits"]["frame_bytes"]
        frame = '{"op":"ping"}'
        assert (await ask(socket, frame.ljust(limit)))["op"] == "pong"
        await socket.send_str(frame.ljust(limit + 1))
        await socket.receive(timeout=SECONDS)
        assert socket.close_code == 1009


async def test_a_viewer_starts_nothing(gateway: GatewayProcess) -> None:
    async with gateway.open(token=token(role="viewer")) as socket:
        await ask(socket)
        answer = await ask(socket, {"op": "start", "agent": "a"})
        assert (answer["reason"], answer["metadata"]["role"]) == ("ROLE_REQUIRED", "runner")


async def test_what_needs_an_absent_service_says_so_in_time(gateway: GatewayProcess) -> None:
    async with gateway.open(token=token()) as socket:
        await ask(socket)
        answer = await ask(socket, {"op": "start", "id": "1", "agent": "a"})
        assert (answer["id"], answer["code"], answer["reason"]) == ("1", "UNAVAILABLE", "PEER_UNAVAILABLE")
        assert answer["retry_after_ms"] > 0
        answer = await ask(socket, {"op": "follow", "id": "2", "run_id": "01a20f61-31f6-7254-a0c7-b29527f68656"})
        assert (answer["id"], answer["code"], answer["reason"]) == ("2", "UNAVAILABLE", "PEER_UNAVAILABLE")


async def test_a_users_sockets_are_counted(gateway: GatewayProcess) -> None:
    async with gateway.open(token=token("ann")) as first, gateway.open(token=token("ann")) as second:
        assert [(await ask(socket))["op"] for socket in (first, second)] == ["welcome"] * 2
        async with gateway.open(token=token("ann")) as third:
            assert await last_words(third) == ("TOO_MANY_CONNECTIONS", 4429)
        async with gateway.open(token=token("bob")) as other:
            assert (await ask(other))["op"] == "welcome"
        await first.close()
        async with gateway.open(token=token("ann")) as fourth:
            assert (await ask(fourth))["op"] == "welcome"


async def test_pings_of_either_side_are_answered(impatient_gateway: GatewayProcess) -> None:
    async with impatient_gateway.open(token=token(), autoping=False) as socket:
        await ask(socket)
        await socket.ping(b"abc")
        message = await socket.receive(timeout=SECONDS)
        assert (message.type, bytes(message.data)) == (aiohttp.WSMsgType.PONG, b"abc")
        for _ in range(2):
            assert (await socket.receive(timeout=SECONDS)).type is aiohttp.WSMsgType.PING
            await socket.pong()


async def test_a_client_that_stays_silent_is_let_go(impatient_gateway: GatewayProcess) -> None:
    async with impatient_gateway.open(token=token(), autoping=False) as socket:
        await ask(socket)
        assert (await socket.receive(timeout=SECONDS)).type is aiohttp.WSMsgType.PING
        assert (await socket.receive(timeout=SECONDS)).type is aiohttp.WSMsgType.CLOSE
        assert socket.close_code == 4408


async def test_a_token_is_good_until_it_expires_and_can_be_renewed() -> None:
    with gateway_process(**SETTINGS) as gateway:
        expire_time = time.time() + 3
        async with (
            gateway.open(token=token("ann", ttl_seconds=3)) as kept,
            gateway.open(token=token("ann", ttl_seconds=3)) as lost,
        ):
            assert [(await ask(socket))["op"] for socket in (kept, lost)] == ["welcome"] * 2
            answer = await ask(kept, {"op": "token", "id": "1", "token": token("bob")})
            assert (answer["id"], answer["reason"]) == ("1", "TOKEN_INVALID")
            assert await ask(kept, {"op": "token", "id": "2", "token": token("ann")}) == {"op": "ok", "id": "2"}
            assert await last_words(lost) == ("TOKEN_INVALID", 4401)
            assert time.time() > expire_time - 1
            assert (await ask(kept, {"op": "ping"}))["op"] == "pong"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_gateway_that_stops_tells_its_clients_and_ends_well(number: signal.Signals) -> None:
    with gateway_process(**SETTINGS) as gateway:
        async with gateway.open(token=token()) as socket:
            await ask(socket)
            gateway.signal(number)
            assert await last_words(socket) == ("DRAINING", 1012)
        assert gateway.exit_code() == 0


def test_a_gateway_ends_with_its_parent() -> None:
    read_end, write_end = os.pipe()
    with gateway_process(pass_fds=(read_end,), parent_fd=read_end) as gateway:
        os.close(read_end)
        os.close(write_end)
        assert gateway.exit_code() == 0
