"""What a link keeps and sends again, without a wire: outcomes must not be lost with a stream, nor kept for ever."""

from __future__ import annotations

import asyncio

import pytest
from mainspring import diagnostics
from mainspring.tool import declare
from mainspring.v1 import dispatcher_pb2 as pb
from mainspring.worker.calls import Calls
from mainspring.worker.link import KEPT_BYTES_MAX, Link, hello_of
from mainspring.worker.serving import _resolve

pytestmark = pytest.mark.unit


def link(*, concurrency: int = 3) -> Link:
    tools = {"echo": declare(diagnostics.echo)}
    calls = Calls(tools, asyncio.TaskGroup(), concurrency=concurrency, threads=1)
    return Link("127.0.0.1:1", hello=hello_of("w", tools, concurrency=concurrency), token=lambda: "token", calls=calls)


def outcome(number: int, size: int = 0) -> pb.WorkerResult:
    return pb.WorkerResult(dispatch_id=number, result=b"x" * size)


def ids(results: list[pb.WorkerResult]) -> list[int]:
    return [result.dispatch_id for result in results]


async def test_what_was_sent_last_is_sent_again_first() -> None:
    found = link(concurrency=3)
    for number in range(1, 6):
        found.put(outcome(number))
    assert ids(found._take()) == [1, 2, 3, 4, 5]
    found.put(outcome(6))
    found._take_back()
    assert list(found._make_hello().known_dispatch_ids) == [3, 4, 5, 6], "as many as may be under way"
    assert ids(found._take()) == [3, 4, 5, 6]


async def test_what_is_kept_is_bounded_in_bytes() -> None:
    found = link(concurrency=10)
    for number in range(1, 4):
        found.put(outcome(number, KEPT_BYTES_MAX // 2))
        found._take()
    found._take_back()
    assert list(found._make_hello().known_dispatch_ids) == [2, 3]


async def test_a_frame_is_bounded() -> None:
    found = link()
    for number in range(600):
        found.put(outcome(number))
    assert [len(found._take()), len(found._take())] == [512, 88]
    for number in range(3):
        found.put(outcome(number, 600_000))
    assert [len(found._take()), len(found._take())] == [2, 1]


async def test_a_target_is_a_list_or_a_name() -> None:
    assert await _resolve("10.0.0.1:50052,10.0.0.2:50052") == ["10.0.0.1:50052", "10.0.0.2:50052"]
    assert "127.0.0.1:50052" in await _resolve("dns:///localhost:50052")
    assert await _resolve("dns:///no-such-host.invalid:50052") == []
