"""Clients that mean harm over HTTP: what they send is refused, and nothing of it reaches the log."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from test_framework.waiting import wait_until
from tests.flow.gateway_process import IDENTITIES, GatewayProcess, gateway_process

pytestmark = pytest.mark.flow

TOKEN = b"a-token-with-a-stray-byte"
STRANGERS_MAX = 3
USER = IDENTITIES.token("acme", "ann")
HEAD = b"POST /v1/runs HTTP/1.1\r\nHost: here\r\n"


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    with gateway_process() as process:
        yield process


@pytest.fixture(scope="module")
def narrow_gateway() -> Iterator[GatewayProcess]:
    with gateway_process(strangers_per_peer_max=STRANGERS_MAX, idle_seconds=2, hello_seconds=60) as process:
        yield process


@asynccontextmanager
async def half_open(gateway: GatewayProcess) -> AsyncIterator[asyncio.StreamReader]:
    """A connection on which no request will ever be whole."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(HEAD)
    try:
        yield reader
    finally:
        writer.close()
        await writer.wait_closed()


async def answer_to(gateway: GatewayProcess, sent: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    try:
        writer.write(sent)
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize(
    "sent",
    [
        HEAD + b"Authorization: Bearer " + TOKEN + b"\x01\r\n\r\n",
        HEAD + b"Authorization: Bearer " + TOKEN * 1_000 + b"\r\n\r\n",
        b"GET /v1/runs?ticket=" + TOKEN + b"\x01 HTTP/1.1\r\n\r\n",
        HEAD + b"Content-Length: -5\r\n\r\n",
        b"\x16\x03\x01\x02\x00" + TOKEN,
    ],
)
async def test_what_is_no_http_is_refused_and_leaves_no_trace(gateway: GatewayProcess, sent: bytes) -> None:
    head, _, body = (await answer_to(gateway, sent)).partition(b"\r\n\r\n")
    assert b" 400 " in head
    assert b"application/problem+json" in head
    assert json.loads(body)["reason"] == "REQUEST_INVALID"
    assert TOKEN not in body
    async with gateway.request("GET", "/healthz") as answer:
        assert answer.status == 200
    log = gateway.log.read_bytes()
    assert TOKEN not in log
    assert b"Traceback" not in log


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        (b"Authorization: Bearer \x80\r\n", "TOKEN_INVALID"),
        (b"Authorization: Bearer %b\r\nIdempotency-Key: \x80\r\n" % USER.encode(), "REQUEST_INVALID"),
    ],
)
async def test_a_header_that_is_no_text_is_refused(gateway: GatewayProcess, headers: bytes, reason: str) -> None:
    sent = b'Connection: close\r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n{"agent":"a"}'
    _, _, body = (await answer_to(gateway, HEAD + headers + sent)).partition(b"\r\n\r\n")
    assert json.loads(body)["reason"] == reason


async def test_a_body_that_nobody_wanted_leaves_no_trace_though_it_is_broken(gateway: GatewayProcess) -> None:
    head, _, body = (
        await answer_to(gateway, HEAD + b"Content-Encoding: gzip\r\nContent-Length: 7\r\n\r\nno gzip")
    ).partition(b"\r\n\r\n")
    assert b" 401 " in head
    assert json.loads(body)["reason"] == "TOKEN_MISSING"
    assert b"Traceback" not in gateway.log.read_bytes()


async def test_a_request_that_does_not_get_whole_is_not_waited_for(narrow_gateway: GatewayProcess) -> None:
    async with half_open(narrow_gateway) as reader:
        assert await asyncio.wait_for(reader.read(), 10) == b""


async def test_strangers_are_counted_and_known_users_are_not(narrow_gateway: GatewayProcess) -> None:
    token = IDENTITIES.token("acme", "ann")
    async with AsyncExitStack() as opened:
        for _ in range(2 * STRANGERS_MAX):
            socket = await opened.enter_async_context(narrow_gateway.open(token=token))
            assert json.loads(await socket.receive_str(timeout=10))["op"] == "welcome"
        silent = [await opened.enter_async_context(narrow_gateway.open()) for _ in range(STRANGERS_MAX)]
        async with narrow_gateway.request("GET", "/v1/runs", headers={"Authorization": f"Bearer {token}"}) as answer:
            problem = await answer.json(content_type=None)
        assert (answer.status, answer.headers["Retry-After"], answer.headers["Connection"]) == (429, "1", "close")
        assert (problem["reason"], problem["metadata"]["limit"]) == ("QUEUE_FULL", str(STRANGERS_MAX))
        await silent[0].send_json({"op": "hello", "token": token})
        assert json.loads(await silent[0].receive_str(timeout=10))["op"] == "welcome"
        async with narrow_gateway.request("GET", "/healthz") as answer:
            assert answer.status == 200


async def test_a_stranger_that_went_away_is_counted_no_longer(narrow_gateway: GatewayProcess) -> None:
    async def is_served() -> bool:
        async with narrow_gateway.request("GET", "/healthz") as answer:
            return answer.status == 200

    async with AsyncExitStack() as opened:
        for _ in range(STRANGERS_MAX):
            await opened.enter_async_context(half_open(narrow_gateway))
        assert not await is_served()
    await wait_until(is_served)


async def test_strangers_are_counted_in_all() -> None:
    with gateway_process(strangers_max=1) as tiny:
        async with half_open(tiny), tiny.request("GET", "/healthz") as answer:
            problem = await answer.json(content_type=None)
        assert (answer.status, problem["reason"], problem["metadata"]["queue"]) == (429, "QUEUE_FULL", "strangers")
