"""One gateway as a process of its own, its peers nowhere: for what it must do whoever else is there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from test_framework.grpc_testing import free_address
from test_framework.identities import Identities
from test_framework.waiting import wait_until_blocking
from test_framework.websocket_client import SUBPROTOCOL

IDENTITIES = Identities("dev-gateway-tests-sign-users-tokens-with-this", "dev-gateway-tests-sign-service-tokens")
STOP_SECONDS = 20

Socket = aiohttp.ClientWebSocketResponse


class GatewayProcess:
    """A running gateway: its address, and ways to speak with it."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, *, log: Path) -> None:
        self.process = process
        self.port = port
        self.log = log
        self.url = f"http://127.0.0.1:{port}"

    @asynccontextmanager
    async def open(
        self,
        *,
        token: str = "",
        origin: str = "",
        query: str = "",
        protocols: tuple[str, ...] = (SUBPROTOCOL,),
        autoping: bool = True,
    ) -> AsyncIterator[Socket]:
        """Opens `/v1/stream`; without a token the first frame has to bring one."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        if origin:
            headers["Origin"] = origin
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(
                f"{self.url}/v1/stream{query}", headers=headers, protocols=protocols, autoping=autoping, max_msg_size=0
            ) as socket,
        ):
            yield socket

    @asynccontextmanager
    async def request(self, method: str, path: str, **options: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        """Sends a request on a connection of its own. Any: what aiohttp takes."""
        async with aiohttp.ClientSession() as session, session.request(method, self.url + path, **options) as answer:
            yield answer

    def signal(self, number: signal.Signals) -> None:
        """Sends the process a signal."""
        self.process.send_signal(number)

    def exit_code(self) -> int:
        """Waits for the end of the process."""
        return self.process.wait(STOP_SECONDS)


@contextmanager
def gateway_process(*, pass_fds: tuple[int, ...] = (), **settings: object) -> Iterator[GatewayProcess]:
    """A gateway that serves while the block runs; `settings` by field name."""
    with tempfile.NamedTemporaryFile(prefix="gateway-", suffix=".log") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mainspring_gateway"], env=environment(**settings), stderr=log, pass_fds=pass_fds
        )
        try:
            port = wait_until_blocking(lambda: _port(Path(log.name), process), what="the gateway's start")
            yield GatewayProcess(process, port, log=Path(log.name))
        finally:
            process.kill()
            process.wait(STOP_SECONDS)


def environment(**settings: object) -> dict[str, str]:
    """The environment of a gateway on a free port with no peers, with the settings given by field name."""
    defaults: dict[str, object] = {
        "listen": "127.0.0.1:0",
        "environment": "development",
        "auth_secret": IDENTITIES.auth_secret,
        "service_secret": IDENTITIES.service_secret,
        **{f"{name}_target": free_address() for name in ("registry", "dispatcher", "execution", "state")},
    }
    ours = {f"MAINSPRING_{name.upper()}": str(value) for name, value in {**defaults, **settings}.items()}
    return {**{name: value for name, value in os.environ.items() if not name.startswith("MAINSPRING_")}, **ours}


def _port(log: Path, process: subprocess.Popen[bytes]) -> int:
    """The port that the process says it serves on; 0: it has not said so yet."""
    lines = log.read_text().splitlines()
    assert process.poll() is None, "\n".join(lines)
    started = [json.loads(line) for line in lines if '"server_started"' in line]
    return int(started[0]["port"]) if started else 0
