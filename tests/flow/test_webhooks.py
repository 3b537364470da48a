"""The end of a run is told to a server outside: signed, again until it is taken, also when state dies meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from mainspring.tokens import webhook_key
from standardwebhooks import Webhook

from test_framework.agents import echo_agent, scripted_agent, step
from test_framework.user import User
from test_framework.waiting import wait_until

pytestmark = [pytest.mark.flow, pytest.mark.real_services]

TELL_SECONDS = 45


class Receiver:
    """A server outside. It answers with what `answers` holds, then with 204."""

    def __init__(self) -> None:
        self.url = ""
        self.answers: list[int] = []
        self.received: list[tuple[dict[str, str], bytes]] = []

    async def take(self, request: web.Request) -> web.Response:
        """One POST."""
        self.received.append((dict(request.headers), await request.read()))
        return web.Response(status=self.answers.pop(0) if self.answers else 204)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A server that takes webhooks."""
    made = Receiver()
    app = web.Application()
    app.router.add_post("/ends", made.take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    made.url = f"http://{host}:{port}/ends"
    yield made
    await runner.cleanup()


def verified(user: User, headers: dict[str, str], body: bytes) -> Any:
    """The message, checked as a receiver does; Any: a JSON value."""
    key = webhook_key(user.stack.identities.service_secret, tenant=user.context.tenant_id)
    return Webhook(key).verify(body, headers)


async def test_an_end_is_told_until_it_is_taken(user: User, receiver: Receiver) -> None:
    receiver.answers = [500]
    await user.register(echo_agent("told") | {"webhook": receiver.url})
    async with user.stream() as socket:
        run_id = await socket.start("told", {"value": 5})
        await socket.ended(run_id)
    await wait_until(lambda: len(receiver.received) == 2, TELL_SECONDS, what="a second attempt")
    messages = [verified(user, headers, body) for headers, body in receiver.received]
    assert messages[0] == messages[1]
    assert (messages[0]["type"], messages[0]["data"]["run_id"]) == ("run.completed", run_id)
    assert messages[0]["data"]["result"] == {"answer": 5}

    async def is_settled() -> bool:
        return not await user.stack.rows.as_owner("SELECT FROM state.webhooks WHERE run_id = $1", run_id)

    await wait_until(is_settled, what="the outbox to forget what was taken")


async def test_an_end_is_told_although_state_dies_with_it(user: User, receiver: Receiver) -> None:
    failing = scripted_agent("failing", step("No.", fail={"code": "INVALID_ARGUMENT", "message": "It cannot be done."}))
    await user.register(failing | {"webhook": receiver.url})
    async with user.stream() as socket:
        run_id = await socket.start("failing", {})
        await socket.ended(run_id)
        await user.stack.kill("state")
    await user.stack.wait_ready()
    await wait_until(lambda: receiver.received, TELL_SECONDS + 60, what="the end after state died")
    message = verified(user, *receiver.received[-1])
    assert message["type"] == "run.failed"
    assert message["data"]["error"]["message"] == "It cannot be done."


async def test_a_receiver_that_is_gone_is_told_no_more(user: User, receiver: Receiver) -> None:
    receiver.answers = [410]
    await user.register(echo_agent("gone") | {"webhook": receiver.url})
    async with user.stream() as socket:
        run_id = await socket.start("gone", {"value": 1})
        await socket.ended(run_id)

    async def is_given_up() -> bool:
        rows = await user.stack.rows.as_owner(
            "SELECT due_time, last_error FROM state.webhooks WHERE run_id = $1", run_id
        )
        return bool(rows) and rows[0]["due_time"] is None and "410" in rows[0]["last_error"]

    await wait_until(is_given_up, TELL_SECONDS, what="a webhook that is given up")
    assert len(receiver.received) == 1
