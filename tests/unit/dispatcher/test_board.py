"""The board alone: where calls go, who may see them, in what order, and what their outcome is."""

from __future__ import annotations

import pytest
from mainspring.v1 import dispatcher_pb2 as pb
from mainspring.v1 import types_pb2
from mainspring_dispatcher.core.board import UNSERVED_SECONDS
from mainspring_kit.errors import MainspringError

from tests.unit.dispatcher.boards import KEYED, PURE, UNSAFE, FakeCaller, Play, make_call

pytestmark = pytest.mark.unit


@pytest.fixture
def play() -> Play:
    return Play()


def test_a_call_goes_to_a_worker_and_its_outcome_to_the_caller(play: Play) -> None:
    worker, link = play.attach("w", "echo")
    play.call("c1", seconds=5, item_id=7)
    (sent,) = link.calls
    assert (sent.call_id, sent.tool, sent.arguments, sent.attempt) == ("c1", "echo", b"{}", 1)
    assert sent.context.tenant_id == "acme"
    assert sent.timeout.ToNanoseconds() == 5_000_000_000
    assert sent.dispatch_id > 1_000
    play.finish(worker, sent, b'{"a":1}')
    answer = play.caller.only
    assert (answer.item_id, answer.call_id, answer.status, answer.result) == (7, "c1", 1, b'{"a":1}')
    assert (answer.attempts, answer.duration_ms, answer.HasField("error")) == (1, 2.0, False)
    assert play.board.under_way == 0


def test_an_attempt_gets_no_more_time_than_the_tool_declares(play: Play) -> None:
    _, link = play.attach("w", "echo")
    declared = types_pb2.Tool(name="echo", effect=PURE)
    declared.timeout.FromSeconds(3)
    play.board.learn("", declared, now=play.now)
    play.call("c1", seconds=60)
    play.call("c2")
    assert [call.timeout.ToSeconds() for call in link.calls] == [3, 3]


def test_the_least_loaded_worker_goes_first(play: Play) -> None:
    _, small = play.attach("small", "echo", concurrency=2)
    _, large = play.attach("large", "echo", concurrency=8)
    for number in range(10):
        play.call(f"c{number}")
    assert (len(small.calls), len(large.calls)) == (2, 8)
    assert len(large.calls[:5]) > len([c for c in small.calls if c.dispatch_id <= large.calls[4].dispatch_id])


def test_calls_wait_in_line_for_a_place_and_go_in_their_order(play: Play) -> None:
    worker, link = play.attach("w", "echo", "other", concurrency=1)
    for number, tool in enumerate(("echo", "other", "echo", "other")):
        play.call(f"c{number}", tool)
    assert link.call_ids == ["c0"]
    for _ in range(3):
        play.finish(worker, link.calls[-1])
    assert link.call_ids == ["c0", "c1", "c2", "c3"]


def test_a_full_line_refuses_with_its_limit() -> None:
    play = Play(waiting_max=2)
    play.attach("w", "echo", concurrency=1)
    for number in range(4):
        play.call(f"c{number}")
    assert play.caller.reasons == ["QUEUE_FULL"]
    assert dict(play.caller.only.error.metadata) == {"queue": "calls", "limit": "2"}
    assert play.caller.only.error.code == "RESOURCE_EXHAUSTED"


def test_a_line_is_full_of_bytes_before_it_is_full_of_calls() -> None:
    play = Play(waiting_max=10_000)
    play.attach("w", "echo", concurrency=1)
    arguments = b'{"a":"' + b"x" * (1 << 20)
    for number in range(260):
        message = make_call(f"c{number}", "echo")
        message.arguments = arguments[: (1 << 20) - 2] + b'"}'
        play.board.submit(message, play.caller, now=play.now)
    assert play.caller.reasons == ["QUEUE_FULL"] * 3
    assert play.board.lines.count == 256


def test_a_call_under_way_is_joined_not_made_again(play: Play) -> None:
    worker, link = play.attach("w", "echo")
    other = FakeCaller()
    play.call("c1", item_id=1)
    play.call("c1", item_id=2, caller=other)
    play.call("c1", item_id=1)
    assert len(link.calls) == 1
    play.finish(worker, link.calls[0])
    assert [answer.item_id for answer in play.caller.answers] == [1]
    assert [answer.item_id for answer in other.answers] == [2]


def test_callers_that_are_gone_make_room_for_those_that_join(play: Play) -> None:
    worker, link = play.attach("w", "echo")
    lost = FakeCaller()
    play.call("c1", caller=lost)
    lost.gone = True
    play.call("c1", item_id=9)
    play.finish(worker, link.calls[0])
    assert lost.answers == []
    assert play.caller.only.item_id == 9


def test_the_same_call_id_of_two_tenants_is_two_calls(play: Play) -> None:
    _, link = play.attach("w", "echo")
    play.call("c1", tenant="acme")
    play.call("c1", tenant="globex")
    assert [call.context.tenant_id for call in link.calls] == ["acme", "globex"]


def test_a_tenants_worker_never_sees_a_foreign_call(play: Play) -> None:
    _, foreign = play.attach("w", "echo", tenant="globex")
    play.call("c1", tenant="acme")
    play.pass_time(1)
    assert foreign.calls == []
    assert play.caller.reasons == ["TOOL_NOT_FOUND"]


def test_a_tenants_own_tool_wins_over_the_shared_one(play: Play) -> None:
    _, shared = play.attach("s", "echo")
    own, own_link = play.attach("o", "echo", tenant="acme")
    play.call("c1", tenant="acme")
    play.call("c2", tenant="globex")
    assert (own_link.call_ids, shared.call_ids) == (["c1"], ["c2"])
    play.board.detach(own, own_link, now=play.now, returns=False)
    play.call("c3", tenant="acme")
    play.pass_time(UNSERVED_SECONDS + 0.5)
    assert shared.call_ids == ["c2"], "a shared tool does not stand in for a tenant's own"
    assert play.caller.reasons == ["WORKER_UNAVAILABLE", "WORKER_UNAVAILABLE"]


def test_an_unknown_tool_is_not_found_after_a_moment(play: Play) -> None:
    play.call("c1", "nothing")
    play.pass_time(0.3)
    assert play.caller.answers == []
    play.pass_time(0.4)
    assert play.caller.reasons == ["TOOL_NOT_FOUND"]
    assert dict(play.caller.only.error.metadata) == {"tool": "nothing"}


def test_a_known_tool_waits_for_its_worker_and_then_is_unavailable(play: Play) -> None:
    play.know("echo")
    play.call("c1")
    play.pass_time(UNSERVED_SECONDS - 0.2)
    assert play.caller.answers == []
    play.pass_time(0.4)
    assert play.caller.reasons == ["WORKER_UNAVAILABLE"]
    assert play.caller.only.error.code == "UNAVAILABLE"


def test_before_the_catalogue_is_read_no_tool_is_unknown(play: Play) -> None:
    play.board.catalogue_complete = False
    play.call("c1")
    play.pass_time(UNSERVED_SECONDS - 0.2)
    assert play.caller.answers == []
    _, link = play.attach("w", "echo")
    assert link.call_ids == ["c1"]


@pytest.mark.parametrize("tenant", ["", "acme"])
def test_a_call_that_came_before_its_tool_is_served_by_it(play: Play, tenant: str) -> None:
    play.call("c1")
    play.call("c2")
    play.pass_time(0.3)
    _, link = play.attach("w", "echo", tenant=tenant)
    assert link.call_ids == ["c1", "c2"]


def test_a_worker_that_restarts_loses_no_call(play: Play) -> None:
    worker, link = play.attach("w1", "echo")
    play.board.detach(worker, link, now=play.now, returns=False)
    play.call("c1")
    play.pass_time(1.5)
    _, link = play.attach("w2", "echo")
    assert link.call_ids == ["c1"]


def test_a_draining_worker_gets_no_more_and_finishes_what_it_has(play: Play) -> None:
    worker, link = play.attach("w", "echo")
    play.call("c1")
    play.board.drain(worker, now=play.now)
    play.call("c2")
    assert link.call_ids == ["c1"]
    play.finish(worker, link.calls[0])
    assert play.caller.reasons == ["TOOL_STATUS_OK"]
    _, other = play.attach("w2", "echo")
    assert other.call_ids == ["c2"]


def test_more_workers_than_allowed_are_refused() -> None:
    play = Play(workers_max=1)
    play.attach("w1", "echo")
    with pytest.raises(MainspringError) as raised:
        play.attach("w2", "echo")
    assert raised.value.reason_name == "QUEUE_FULL"


def test_an_outcome_of_an_unsafe_call_is_told_again_not_made_again(play: Play) -> None:
    worker, link = play.attach("w", "pay", effect=UNSAFE)
    play.call("c1", "pay", effect=UNSAFE)
    play.finish(worker, link.calls[0], b'"paid"')
    play.call("c1", "pay", effect=UNSAFE, item_id=2)
    assert len(link.calls) == 1
    assert [(answer.item_id, answer.result) for answer in play.caller.answers] == [(1, b'"paid"'), (2, b'"paid"')]
    play.call("c1", "pay", effect=UNSAFE, attempt=2)
    assert len(link.calls) == 2, "another attempt is somebody's decision"
    play.finish(worker, link.calls[1])
    play.pass_time(61, worker)
    play.call("c1", "pay", effect=UNSAFE)
    assert len(link.calls) == 3, "and nothing is remembered for ever"


def test_the_catalogues_word_makes_a_call_unsafe_too(play: Play) -> None:
    worker, link = play.attach("w", "pay", effect=UNSAFE)
    play.call("c1", "pay", effect=KEYED)
    play.board.detach(worker, link, now=play.now, returns=False)
    assert play.caller.reasons == ["WORKER_LOST"]


def _broken(**changes: object) -> pb.ToolCall:
    call = make_call("c1")
    for name, value in changes.items():
        owner, _, field = name.rpartition("__")
        setattr(getattr(call, owner) if owner else call, field, value)
    return call


@pytest.mark.parametrize(
    ("call", "reason", "field"),
    [
        (_broken(context__tenant_id=""), "CONTEXT_INVALID", "tenant_id"),
        (_broken(context__user_id=" "), "CONTEXT_INVALID", "user_id"),
        (_broken(context__run_id=""), "CONTEXT_INVALID", "run_id"),
        (_broken(context__session_id=""), "CONTEXT_INVALID", "session_id"),
        (_broken(call_id=""), "REQUEST_INVALID", "call_id"),
        (_broken(tool="x" * 129), "REQUEST_INVALID", "tool"),
        (_broken(effect=0), "REQUEST_INVALID", "effect"),
        (_broken(timeout__seconds=-1), "REQUEST_INVALID", "timeout"),
        (_broken(arguments=b"x" * (1 << 20 | 1)), "PAYLOAD_TOO_LARGE", "arguments"),
    ],
)
def test_a_call_that_breaks_the_contract_is_answered_and_goes_nowhere(
    play: Play, call: pb.ToolCall, reason: str, field: str
) -> None:
    _, link = play.attach("w", "echo")
    play.board.submit(call, play.caller, now=play.now)
    assert link.calls == []
    assert play.caller.reasons == [reason]
    assert play.caller.only.error.metadata["field"] == field
