"""Outboxes collect, bound and close; links re-send in order. Pure: no wire."""

import asyncio

import pytest
from mainspring.v1 import dispatcher_pb2 as pb
from mainspring_kit.errors import MainspringError
from mainspring_kit.streams import FRAME_BYTES_MAX, Outbox, Replies, _Link

pytestmark = pytest.mark.unit


def call(number: int, size: int = 0) -> pb.ToolCall:
    return pb.ToolCall(item_id=number, call_id=str(number), arguments=b"x" * size)


async def test_all_that_is_queued_goes_in_one_frame() -> None:
    outbox: Outbox[pb.ToolCall] = Outbox("calls")
    taken = asyncio.ensure_future(outbox.take())
    await asyncio.sleep(0)
    for number in range(5):
        outbox.put(call(number))
    assert [item.item_id for item in await taken] == [0, 1, 2, 3, 4]


async def test_frames_are_capped_in_items_and_bytes() -> None:
    outbox: Outbox[pb.ToolCall] = Outbox("calls")
    for number in range(600):
        outbox.put(call(number))
    assert [len(await outbox.take()), len(await outbox.take())] == [512, 88]
    for number in range(3):
        outbox.put(call(number, FRAME_BYTES_MAX - 100))
    assert len(await outbox.take()) == 1


async def test_a_full_outbox_refuses_and_a_single_large_item_passes() -> None:
    outbox: Outbox[pb.ToolCall] = Outbox("calls", items_max=2, bytes_max=100)
    outbox.put(call(1, 500))
    with pytest.raises(MainspringError, match="QUEUE_FULL"):
        outbox.put(call(2))
    await outbox.take()
    outbox.put(call(2))
    outbox.put(call(3))
    with pytest.raises(MainspringError, match="QUEUE_FULL"):
        outbox.put(call(4))


async def test_a_closed_outbox_gives_the_rest_and_then_nothing() -> None:
    outbox: Outbox[pb.ToolCall] = Outbox("calls")
    outbox.put(call(1))
    outbox.close()
    assert len(await outbox.take()) == 1
    assert await outbox.take() == []


async def test_replies_end_when_all_is_answered() -> None:
    replies: Replies[pb.ToolResult] = Replies("calls", 2)
    replies.expect(2)
    with pytest.raises(MainspringError, match="QUEUE_FULL"):
        replies.expect()
    replies = Replies("calls", 2)
    replies.expect()
    replies.end()
    replies.put(pb.ToolResult(item_id=1))
    assert len(await replies.outbox.take()) == 1
    assert await replies.outbox.take() == []


async def test_a_rewound_link_sends_everything_unanswered_again_in_order() -> None:
    link: _Link[pb.ToolCall, pb.ToolResult] = _Link("here")
    futures = [asyncio.get_running_loop().create_future() for _ in range(5)]
    for number, future in enumerate(futures, 1):
        link.add(call(number), future)
    assert len(await link.next_frame(3)) == 3
    link.resolve(pb.ToolResult(item_id=2))
    assert futures[1].done()
    futures[4].cancel()
    link.rewind(lambda _: None)
    assert [item.item_id for item in await link.next_frame(10)] == [1, 3, 4]


async def test_credit_bounds_what_is_under_way() -> None:
    link: _Link[pb.ToolCall, pb.ToolResult] = _Link("here")
    for number in range(1, 6):
        link.add(call(number), asyncio.get_running_loop().create_future())
    assert len(await link.next_frame(4)) == 4
    waiting = asyncio.ensure_future(link.next_frame(4))
    await asyncio.sleep(0)
    assert not waiting.done()
    link.resolve(pb.ToolResult(item_id=1))
    assert [item.item_id for item in await waiting] == [5]


async def test_a_sent_item_that_may_not_be_sent_again_is_answered_as_lost() -> None:
    link: _Link[pb.ToolCall, pb.ToolResult] = _Link("here")
    sent, unsent = (asyncio.get_running_loop().create_future() for _ in range(2))
    link.add(call(1), sent)
    await link.next_frame(10)
    link.add(call(2), unsent)
    link.rewind(lambda item: pb.ToolResult(item_id=item.item_id, call_id="lost"))
    assert sent.result().call_id == "lost"
    assert not unsent.done(), "what was never sent is still sent"
    assert [item.item_id for item in await link.next_frame(10)] == [2]
