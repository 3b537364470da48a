"""Clients that mean harm over HTTP: what they send is refused, and nothing of it reaches the log."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.flow.gateway_process import GatewayProcess, gateway_process

pytestmark = pytest.mark.flow

TOKEN = b"a-token-with-a-stray-byte"
HEAD = b"POST /v1/runs HTTP/1.1\r\nHost: here\r\n"


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    with gateway_process() as process:
        yield process


async def answer_to(gateway: GatewayProcess, sent: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    try:
        writer.write(sent)
        return await asyncio.wait_for(reader.readline(), 10)
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
    assert b" 400 " in await answer_to(gateway, sent)
    async with gateway.request("GET", "/healthz") as answer:
        assert answer.status == 200
    log = gateway.log.read_bytes()
    assert TOKEN not in log
    assert b"Traceback" not in log
