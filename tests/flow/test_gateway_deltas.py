"""Text as a model says it, on real sockets: live, so far for who comes late, and never at an event's expense."""

from __future__ import annotations

import asyncio
import socket as sockets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from mainspring import Client, Delta

from test_framework.agents import Spec, call, scripted_agent, step
from test_framework.identities import make_context
from test_framework.stack import Stack
from test_framework.user import User
from test_framework.websocket_client import SUBPROTOCOL, Frame, StreamClient, check_log

pytestmark = [pytest.mark.flow, pytest.mark.websocket, pytest.mark.real_services]

TEXT = "Grüße an alle, von 🌍 zu 🌍. " * 20
SAID_SECONDS = 2
LONG = 500_000
LONG_STEPS = 7


def speaking_agent() -> Spec:
    """It says one thing slowly, then another at once."""
    said = step("{{input.text}}", call("diagnostics.echo"), deltas=60, delay=f"{SAID_SECONDS}s")
    return scripted_agent("speaking", said, step("Done.", deltas=3, result="done"))


def chattering_agent() -> Spec:
    """It says much, several times."""
    said = step("{{input.text}}", call("diagnostics.echo"), deltas=50, delay="200ms")
    return scripted_agent("chattering", *[said] * LONG_STEPS, step("Done.", result="done"))


@pytest.fixture(scope="module")
def flow_stack(real_services_fixture: Stack) -> Stack:
    """The session's: nothing is killed here."""
    return real_services_fixture


@pytest.fixture
async def speaker(user: User) -> User:
    """A user whose tenant has the agents."""
    await user.register(speaking_agent(), chattering_agent())
    return user


def deltas(client: StreamClient, run_id: str) -> list[Frame]:
    return [frame for frame in client.frames if frame["op"] == "delta" and frame["run_id"] == run_id]


def texts(client: StreamClient, run_id: str) -> dict[int, str]:
    """The text of each step as a client puts it together; every piece must fit to what it has."""
    found: dict[int, str] = {}
    for frame in deltas(client, run_id):
        known = found.get(frame["step"], "")
        assert frame["offset"] <= len(known), frame
        found[frame["step"]] = known[: frame["offset"]] + frame["text"]
    return found


async def first_delta(client: StreamClient, run_id: str) -> Frame:
    return await client.wait_for(lambda frame: frame["op"] == "delta" and frame["run_id"] == run_id, "text")


async def test_text_comes_piece_by_piece_before_its_event(speaker: User) -> None:
    async with speaker.stream() as client:
        run_id = await client.start("speaking", {"text": TEXT})
        events = await client.ended(run_id)
        check_log(events)
        assert texts(client, run_id) | {2: ""} == {1: TEXT, 2: ""}
        said = deltas(client, run_id)
        assert len([frame for frame in said if frame["step"] == 1]) > 5
        thinking = next(event for event in events if event["type"] == "agent_thinking")
        assert thinking["data"]["text"] == TEXT
        assert {
            frame["step"] for frame in client.frames[client.frames.index(thinking) :] if frame["op"] == "delta"
        } <= {2}
        assert set(said[0]) == {"op", "run_id", "step", "offset", "text"}


async def test_who_comes_late_gets_the_text_so_far_and_then_what_follows(speaker: User) -> None:
    async with speaker.stream() as early, speaker.stream() as late:
        run_id = await early.start("speaking", {"text": TEXT})
        await early.wait_for(lambda frame: frame["op"] == "delta" and frame["offset"] > 100, "some text")
        await late.follow(run_id)
        first = await first_delta(late, run_id)
        caught_up = next(frame for frame in late.frames if frame["op"] == "caught_up")
        assert late.frames.index(caught_up) < late.frames.index(first)
        assert (first["offset"], first["text"]) == (0, TEXT[: len(first["text"])])
        assert len(first["text"]) > 100
        await late.until(run_id, "agent_thinking")
        assert texts(late, run_id)[1] == TEXT


async def test_a_foreign_user_is_shown_nothing(speaker: User) -> None:
    async with User(speaker.stack, make_context(speaker.context.tenant_id)) as colleague, speaker.stream() as client:
        run_id = await client.start("speaking", {"text": TEXT})
        await first_delta(client, run_id)
        async with colleague.stream() as other:
            assert (await other.ask("follow", run_id=run_id))["reason"] == "RUN_NOT_FOUND"
            own = await other.start("speaking", {"text": "mine"})
            await client.ended(run_id)
            await other.ended(own)
            assert {frame["run_id"] for frame in other.frames if frame["op"] in ("delta", "event")} == {own}


async def test_the_python_client_is_given_text_while_it_comes(speaker: User) -> None:
    said: list[Delta] = []
    async with Client(speaker.stack.gateway, speaker.token) as client:
        stream = client.stream("speaking", {"text": TEXT}, on_text=said.append)
        steps = [len(said) async for event in stream if event.type in ("agent_started", "agent_thinking")]
    assert steps[0] == 0 < steps[1]
    assert "".join(delta.text for delta in said if delta.step == 1) == TEXT
    assert all(delta.offset <= len(TEXT) for delta in said)


@asynccontextmanager
async def narrow_stream(user: User) -> AsyncIterator[StreamClient]:
    """A socket whose kernel takes little that is not read."""

    def narrow(address: aiohttp.AddrInfoType) -> sockets.socket:
        made = sockets.socket(*address[:3])
        made.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 8_192)
        return made

    url, headers = f"{user.stack.gateway}/v1/stream", {"Authorization": f"Bearer {user.token}"}
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(socket_factory=narrow)) as session,
        session.ws_connect(url, headers=headers, protocols=(SUBPROTOCOL,), max_msg_size=0) as socket,
    ):
        client = StreamClient(socket)
        await client.wait_for(lambda frame: frame["op"] == "welcome", "the welcome")
        yield client


async def test_a_slow_socket_is_spared_text_and_misses_no_event(speaker: User) -> None:
    async with speaker.stream() as quick, narrow_stream(speaker) as slow:
        run_id = await quick.start("chattering", {"text": "x" * LONG})
        await slow.follow(run_id)
        await quick.ended(run_id)
        events = await slow.ended(run_id)
        assert events == quick.events(run_id)
        check_log(events)
        said, heard = (sum(len(frame["text"]) for frame in deltas(client, run_id)) for client in (quick, slow))
        assert heard < said * 0.9, (heard, said)
        texts(slow, run_id)
        async with asyncio.timeout(20):
            assert (await slow.ask("ping"))["op"] == "pong"
