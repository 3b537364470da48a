"""The WebSocket protocol by the Autobahn suite's own cases: against the gateway, and against an echo of its settings.

The gateway is no echo server, so each case is judged twice. Against the gateway a message that is no JSON has to end
the socket as docs say, and whatever else a case sends has to be met as the case demands. The echo is made of the
gateway's own WebSocket, frames and outgoing queue: there a case has to come out as its authors wrote it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp import WSCloseCode, WSMsgType, web
from mainspring_gateway.config import GatewaySettings
from mainspring_gateway.core.frames import pong_frame, text_frame
from mainspring_gateway.outgoing import Flusher, Outgoing
from mainspring_gateway.socket import make_websocket
from pydantic import SecretStr

from tests.flow.gateway_process import IDENTITIES, GatewayProcess, gateway_process

pytestmark = [pytest.mark.flow, pytest.mark.websocket, pytest.mark.timeout(300)]

KOSOKU = Path(sys.executable).parent / "kosoku"
SUITE_SECONDS = 240
CASES_AT_A_TIME = 4
# All but those of large messages and of compression; all.
CASES = {"gateway": 247, "echo": 517}
PASSED = {"OK", "NON-STRICT", "INFORMATIONAL"}
NO_JSON = 4400
ERROR_FRAME = '{"op":"error","code":"INVALID_ARGUMENT","reason":"REQUEST_INVALI'
MESSAGE_BYTES_MAX = 16 << 20

# Patterns of cases -> why they do not pass.
EXCEPTIONS = {
    "7.9.5": "aiohttp takes 1006, which no peer may send, for a code like others; it answers and ends the socket",
    "12.*": "compression is declined: an event's frame is made once for all its watchers",
    "13.*": "compression is declined, whatever its parameters",
}

Case = dict[str, Any]  # Any: JSON


async def run_cases(url: str, folder: Path, *, without: tuple[str, ...] = ()) -> dict[str, Case]:
    """Runs the cases in a process of their own, which they want changed; returns each one's report."""
    options = [part for pattern in without for part in ("--exclude", pattern)]
    process = await asyncio.create_subprocess_exec(
        KOSOKU,
        *options,
        *("--parallelism", str(CASES_AT_A_TIME), "--outdir", folder),
        url,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(SUITE_SECONDS):
        told, _ = await process.communicate()
    cases = read_reports(folder)
    assert cases, told.decode()
    return cases


def read_reports(folder: Path) -> dict[str, Case]:
    """Each case by its id."""
    reports = [json.loads(path.read_text()) for path in folder.glob("*.json") if path.name != "index.json"]
    return {report["id"]: report for report in reports}


def failures(cases: Mapping[str, Case]) -> dict[str, str]:
    """The exceptions that have cases that failed, with their reasons, and any other such case with what it says."""
    found = {}
    for case_id, case in cases.items():
        if not has_passed(case):
            pattern = next((pattern for pattern in EXCEPTIONS if fnmatch(case_id, pattern)), "")
            found[pattern or case_id] = EXCEPTIONS.get(pattern) or f"{case['result']} {case['resultClose']}"
    return found


def has_passed(case: Case) -> bool:
    return case["behavior"] in PASSED and case["behaviorClose"] in PASSED


def wants_echo(case: Case) -> bool:
    """Whether a message has to come back, or a text has to be found broken."""
    messages = any(event[0] == "message" for events in case["expected"].values() for event in events)
    return messages or case["id"].startswith("6.")


def ended_as_no_json(case: Case) -> bool:
    """Whether all that came back is one error frame, then the close of a frame that can't be read."""
    data = [event for event in case["received"] if event[0] == "message"]
    return [begin[1].startswith(ERROR_FRAME) for begin in data] == [True] and case["remoteCloseCode"] == NO_JSON


@pytest.fixture
def gateway() -> Iterator[GatewayProcess]:
    with gateway_process() as process:
        yield process


@pytest.fixture
async def echo_url() -> AsyncIterator[str]:
    """The address of an echo that speaks the protocol with the gateway's settings, reader and writer."""
    settings = GatewaySettings(
        auth_secret=SecretStr(IDENTITIES.auth_secret),
        service_secret=SecretStr(IDENTITIES.service_secret),
        environment="development",
        frame_bytes_max=MESSAGE_BYTES_MAX,
        queue_bytes_max=4 * MESSAGE_BYTES_MAX,
    )
    app = web.Application()
    app.router.add_get("/", partial(echo, settings))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"ws://127.0.0.1:{runner.addresses[0][1]}/"
    await runner.cleanup()


async def echo(settings: GatewaySettings, request: web.Request) -> web.WebSocketResponse:
    """Sends every message back; a text that is none ends the socket."""
    ws = make_websocket(settings)
    writer = await ws.prepare(request)
    assert writer is not None and request.transport is not None
    bounds = {"bytes_max": settings.queue_bytes_max, "frames_max": settings.queue_frames_max}
    outgoing = Outgoing(request.transport, writer, flusher=Flusher(), on_slow=request.transport.abort, **bounds)
    async for message in ws:
        if message.type is WSMsgType.PING:
            outgoing.send(pong_frame(bytes(message.data)))
        elif message.type is WSMsgType.BINARY:
            await ws.send_bytes(message.data)
        elif message.type is WSMsgType.TEXT:
            try:
                message.data.decode()
            except UnicodeDecodeError:
                await ws.close(code=WSCloseCode.INVALID_TEXT)
            else:
                outgoing.send(text_frame(message.data))
    return ws


async def test_the_gateway_keeps_the_protocol(gateway: GatewayProcess, tmp_path: Path) -> None:
    cases = await run_cases(f"ws://127.0.0.1:{gateway.port}/v1/stream", tmp_path, without=("9.*", "12.*", "13.*"))
    assert len(cases) == CASES["gateway"]
    strict = {case_id: case for case_id, case in cases.items() if not wants_echo(case)}
    assert failures(strict) == {"7.9.5": EXCEPTIONS["7.9.5"]}
    assert [case_id for case_id in cases if case_id not in strict and not ended_as_no_json(cases[case_id])] == []
    assert "Traceback" not in gateway.log.read_text()


@pytest.mark.long
async def test_an_echo_of_the_gateways_settings_keeps_the_protocol(echo_url: str, tmp_path: Path) -> None:
    cases = await run_cases(echo_url, tmp_path)
    assert len(cases) == CASES["echo"]
    assert failures(cases) == EXCEPTIONS
