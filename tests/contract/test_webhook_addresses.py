"""No webhook leads into our own network, whatever its host is called."""

from __future__ import annotations

import aiohttp
import pytest
from aiohttp import web
from mainspring_state.engine.webhooks import public_socket

pytestmark = pytest.mark.contract


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "2130706433"])
async def test_a_private_address_is_not_connected_to(host: str) -> None:
    asked: list[str] = []

    async def take(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response()

    app = web.Application()
    app.router.add_post("/", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=public_socket)) as guarded,
        aiohttp.ClientSession() as free,
    ):
        with pytest.raises(aiohttp.ClientError):
            await guarded.post(f"http://{host}:{port}/")
        assert not asked
        # The server is there: it was the guard.
        await free.post(f"http://127.0.0.1:{port}/")
        assert asked
    await runner.cleanup()
