"""The board alone: workers that break off, fall silent, come back or die, deadlines and cancels."""

from __future__ import annotations

import pytest
from mainspring.v1 import dispatcher_pb2 as pb
from mainspring.v1 import types_pb2
from mainspring_dispatcher.core.board import UNSERVED_SECONDS

from tests.unit.dispatcher.boards import KEYED, PURE, UNSAFE, Play

pytestmark = pytest.mark.unit


@pytest.fixture
def play() -> Play:
    return Play()


@pytest.mark.parametrize("effect", [PURE, types_pb2.EFFECT_CLASS_IDEMPOTENT, KEYED])
def test_a_repeatable_call_of_a_dead_worker_goes_to_another(
    play: Play, effect: types_pb2.EffectClass.ValueType
) -> None:
    first, first_link = play.attach("w1", "echo", concurrency=1)
    second, second_link = play.attach("w2", "echo")
    play.call("c1", effect=effect, attempt=3)
    victim, link, other, other_link = (
        (first, first_link, second, second_link) if first_link.calls else (second, second_link, first, first_link)
    )
    play.board.detach(victim, link, now=play.now, returns=False)
    (again,) = other_link.calls
    assert (again.call_id, again.attempt) == ("c1", 4)
    assert again.dispatch_id != link.calls[0].dispatch_id
    play.finish(other, again)
    assert (play.caller.only.status, play.caller.only.attempts) == (1, 2)


def test_an_unsafe_call_of_a_dead_worker_is_lost(play: Play) -> None:
    worker, link = play.attach("w", "pay", effect=UNSAFE)
    _, other = play.attach("w2", "pay", effect=UNSAFE)
    play.call("c1", "pay", effect=UNSAFE)
    play.board.detach(worker, link, now=play.now, returns=False)
    assert other.calls == []
    assert play.caller.reasons == ["WORKER_LOST"]
    assert dict(play.caller.only.error.metadata) == {"tool": "pay", "call_id": "c1"}


def test_an_unsafe_call_waits_for_a_worker_whose_stream_broke(play: Play) -> None:
    worker, link = play.attach("w", "pay", effect=UNSAFE)
    play.call("c1", "pay", effect=UNSAFE)
    play.board.detach(worker, link, now=play.now, returns=True)
    play.pass_time(2)
    assert play.caller.answers == []
    again, link_again = play.attach("w", "pay", effect=UNSAFE, knows=link.calls)
    assert again is worker
    assert link_again.calls == []
    play.finish(again, link.calls[0])
    assert play.caller.reasons == ["TOOL_STATUS_OK"]


def test_an_unsafe_call_is_lost_when_its_worker_does_not_come_back(play: Play) -> None:
    worker, link = play.attach("w", "pay", effect=UNSAFE)
    play.call("c1", "pay", effect=UNSAFE, seconds=60)
    play.board.detach(worker, link, now=play.now, returns=True)
    play.pass_time(3.2)
    assert play.caller.reasons == ["WORKER_LOST"]
    again, _ = play.attach("w", "pay", effect=UNSAFE)
    play.finish(again, link.calls[0])
    assert len(play.caller.answers) == 1
    assert play.board.counts.results_late == 1


def test_a_silent_worker_is_dead_and_is_told_so(play: Play) -> None:
    silent, link = play.attach("w1", "echo", concurrency=1)
    play.call("c1")
    beating, other = play.attach("w2", "echo")
    play.pass_time(2.8, beating)
    assert other.calls == []
    play.pass_time(0.4, beating)
    assert other.call_ids == ["c1"]
    assert len(link.faults) == 1
    play.board.detach(silent, link, now=play.now, returns=True)  # its stream ends now
    play.finish(beating, other.calls[0])
    assert play.caller.reasons == ["TOOL_STATUS_OK"]
    assert play.board.attached == 1


def test_a_call_is_executed_three_times_at_most(play: Play) -> None:
    for number in range(3):
        worker, link = play.attach(f"w{number}", "echo")
        if number == 0:
            play.call("c1")
        assert link.call_ids == ["c1"]
        play.board.detach(worker, link, now=play.now, returns=False)
    assert play.caller.reasons == ["WORKER_LOST"]
    assert play.caller.only.attempts == 3


def test_the_first_result_of_two_executions_counts_and_ends_the_other(play: Play) -> None:
    first, link = play.attach("w1", "echo", concurrency=1)
    play.call("c1")
    second, second_link = play.attach("w2", "echo")
    play.board.detach(first, link, now=play.now, returns=True)
    assert second_link.call_ids == ["c1"]
    first_again, _ = play.attach("w1", "echo", knows=link.calls)
    play.finish(first_again, link.calls[0], b'"first"')
    assert play.caller.only.result == b'"first"'
    assert second_link.cancelled == [second_link.calls[0].dispatch_id]
    play.finish(second, second_link.calls[0], b'"second"')
    assert len(play.caller.answers) == 1
    assert play.board.counts.results_late == 1


def test_a_worker_that_returns_goes_on_with_what_nobody_else_took(play: Play) -> None:
    worker, link = play.attach("w", "echo")
    play.call("c1")
    play.board.detach(worker, link, now=play.now, returns=True)
    play.pass_time(1)
    again, again_link = play.attach("w", "echo", knows=link.calls)
    _, other = play.attach("w2", "echo")
    assert (again_link.calls, other.calls) == ([], [])
    assert play.board.lines.count == 0
    play.finish(again, link.calls[0])
    assert (play.caller.only.status, play.caller.only.attempts) == (1, 1)


def test_a_repeatable_call_that_never_reached_the_worker_is_sent_again(play: Play) -> None:
    worker, link = play.attach("w", "echo", concurrency=2)
    play.call("c1")
    play.call("c2")
    play.board.detach(worker, link, now=play.now, returns=True)
    again, again_link = play.attach("w", "echo", concurrency=2, knows=link.calls[1:])
    assert again_link.call_ids == ["c1"]
    assert again_link.calls[0].dispatch_id not in (call.dispatch_id for call in link.calls)
    play.finish(again, again_link.calls[0])
    play.finish(again, link.calls[1])
    assert play.caller.reasons == ["TOOL_STATUS_OK", "TOOL_STATUS_OK"]
    assert len(again.calls) == 0


@pytest.mark.parametrize("returns", [True, False])
def test_an_unsafe_call_that_a_returning_worker_does_not_know_is_lost(play: Play, returns: bool) -> None:
    worker, link = play.attach("w", "pay", effect=UNSAFE)
    play.call("c1", "pay", effect=UNSAFE)
    if returns:
        play.board.detach(worker, link, now=play.now, returns=True)
    _, again = play.attach("w", "pay", effect=UNSAFE)
    assert again.calls == []
    assert play.caller.reasons == ["WORKER_LOST"]


def test_a_cancelled_call_that_a_returning_worker_does_not_know_has_stopped(play: Play) -> None:
    worker, link = play.attach("w", "pay", effect=UNSAFE)
    play.call("c1", "pay", effect=UNSAFE)
    play.attach("w", "pay", effect=UNSAFE, knows=link.calls)
    told = play.cancel("c1")
    play.attach("w", "pay", effect=UNSAFE)
    assert play.caller.reasons == ["TOOL_CANCELLED"]
    assert [outcome.found for outcome in told] == [True]
    assert worker.calls == {}


def test_places_that_nobody_knows_of_are_free_again(play: Play) -> None:
    worker, link = play.attach("w", "echo", concurrency=1)
    play.call("c1", seconds=1)
    play.pass_time(1.1, worker)
    play.board.detach(worker, link, now=play.now, returns=True)
    again, _ = play.attach("w", "echo", concurrency=1)
    assert again.takes_calls


def test_a_worker_that_returns_and_breaks_off_again_passes_its_call_on(play: Play) -> None:
    worker, link = play.attach("w", "echo")
    play.call("c1")
    play.board.detach(worker, link, now=play.now, returns=True)
    again, again_link = play.attach("w", "echo", knows=link.calls)
    play.board.detach(again, again_link, now=play.now, returns=True)
    _, other = play.attach("w2", "echo")
    assert other.call_ids == ["c1"]


def test_a_worker_that_returns_is_told_of_calls_that_nobody_wants_any_more(play: Play) -> None:
    first, link = play.attach("w1", "echo", concurrency=1)
    play.call("c1")
    second, second_link = play.attach("w2", "echo")
    play.board.detach(first, link, now=play.now, returns=True)
    play.finish(second, second_link.calls[0])
    again, again_link = play.attach("w1", "echo", concurrency=1, knows=link.calls)
    assert again_link.cancelled == [link.calls[0].dispatch_id]
    assert not again.takes_calls, "its place is free only when it says that the execution ended"


@pytest.mark.parametrize("tenant", ["", "acme"])
def test_attaching_again_replaces_the_stream(play: Play, tenant: str) -> None:
    worker, old = play.attach("w", "echo", tenant=tenant)
    play.call("c1")
    again, new = play.attach("w", "echo", tenant=tenant, knows=old.calls)
    assert again is worker
    assert len(old.faults) == 1
    play.board.detach(worker, old, now=play.now, returns=True)  # the old stream's end changes nothing
    play.call("c2")
    assert new.call_ids == ["c2"]
    play.finish(worker, old.calls[0])
    assert play.caller.only.call_id == "c1"


def test_attaching_again_takes_back_what_is_no_longer_served(play: Play) -> None:
    play.attach("w", "echo", "other")
    _, link = play.attach("w", "echo")
    play.call("c1", "other")
    play.pass_time(UNSERVED_SECONDS + 0.2)
    assert link.calls == []
    assert play.caller.reasons == ["WORKER_UNAVAILABLE"]


def test_calls_of_a_lost_worker_keep_their_order_and_go_before_those_in_line(play: Play) -> None:
    worker, link = play.attach("w1", "echo", concurrency=2)
    for number in range(4):
        play.call(f"c{number}")
    play.board.detach(worker, link, now=play.now, returns=False)
    _, other = play.attach("w2", "echo")
    assert other.call_ids == ["c0", "c1", "c2", "c3"]


def test_a_line_waits_anew_when_its_last_worker_leaves(play: Play) -> None:
    worker, link = play.attach("w", "echo", concurrency=1)
    play.call("c1")
    play.call("c2")
    play.pass_time(10, worker)
    play.board.detach(worker, link, now=play.now, returns=False)
    play.pass_time(UNSERVED_SECONDS - 0.2)
    assert play.caller.answers == []
    play.pass_time(0.4)
    assert play.caller.reasons == ["WORKER_UNAVAILABLE", "WORKER_UNAVAILABLE"]


def test_a_silent_worker_is_not_waited_for(play: Play) -> None:
    worker, _ = play.attach("w", "pay", effect=UNSAFE)
    play.call("c1", "pay", effect=UNSAFE)
    play.pass_time(2.9)
    assert play.caller.answers == []
    play.pass_time(0.2)
    assert play.caller.reasons == ["WORKER_LOST"]
    assert worker.link is None


def test_a_cancelled_call_of_a_broken_worker_leaves_the_line(play: Play) -> None:
    worker, link = play.attach("w1", "echo")
    play.call("c1")
    play.board.detach(worker, link, now=play.now, returns=True)
    told = play.cancel("c1")
    _, other = play.attach("w2", "echo")
    assert other.calls == []
    _, again = play.attach("w1", "echo", knows=link.calls)
    assert again.cancelled == [link.calls[0].dispatch_id]
    assert told == []


def test_a_worker_cannot_take_the_place_of_another_tenants(play: Play) -> None:
    victim, link = play.attach("w", "echo", tenant="acme")
    play.call("c1")
    thief, _ = play.attach("w", "echo", tenant="globex")
    assert thief is not victim
    assert link.faults == []
    play.finish(thief, link.calls[0])
    assert play.caller.answers == []


def test_a_call_out_of_time_is_answered_and_cancelled_in_its_worker(play: Play) -> None:
    worker, link = play.attach("w", "echo", concurrency=1)
    play.call("c1", seconds=1)
    play.pass_time(1.1, worker)
    assert play.caller.reasons == ["TOOL_TIMED_OUT"]
    assert play.caller.only.status == types_pb2.TOOL_STATUS_TIMED_OUT
    assert dict(play.caller.only.error.metadata) == {"tool": "echo", "timeout_seconds": "1"}
    assert link.cancelled == [link.calls[0].dispatch_id]
    play.call("c2")
    assert link.call_ids == ["c1"], "the place stays taken until the worker answers"
    play.finish(worker, link.calls[0])
    assert link.call_ids == ["c1", "c2"]


def test_a_call_may_run_out_of_time_in_line(play: Play) -> None:
    worker, _ = play.attach("w", "echo", concurrency=1)
    play.call("c1")
    play.call("c2", seconds=4)
    play.pass_time(4.1, worker)
    assert play.caller.reasons == ["TOOL_TIMED_OUT"]
    assert play.board.lines.count == 0


def test_a_cancel_reaches_the_worker_and_its_word_the_asker(play: Play) -> None:
    worker, link = play.attach("w", "echo")
    play.call("c1")
    told = play.cancel("c1")
    assert told == []
    assert link.cancelled == [link.calls[0].dispatch_id]
    play.now += 0.2
    play.board.acknowledge(worker, "c1", now=play.now)
    (outcome,) = told
    assert (outcome.found, outcome.acknowledged) == (True, True)
    assert outcome.after_ms == pytest.approx(200)
    done = pb.WorkerResult(dispatch_id=link.calls[0].dispatch_id, status=types_pb2.TOOL_STATUS_CANCELLED)
    done.error.code, done.error.reason = "CANCELLED", "TOOL_CANCELLED"
    play.board.finish(worker, done, now=play.now)
    assert play.caller.reasons == ["TOOL_CANCELLED"]
    assert len(told) == 1


def test_a_worker_that_does_not_stop_acknowledges_nothing(play: Play) -> None:
    worker, _ = play.attach("w", "echo")
    play.call("c1")
    told = play.cancel("c1")
    play.pass_time(4.7, worker)
    assert told == []
    play.pass_time(0.2, worker)
    assert [(outcome.found, outcome.acknowledged) for outcome in told] == [(True, False)]
    assert play.caller.reasons == ["TOOL_CANCELLED"]
    assert play.caller.only.status == types_pb2.TOOL_STATUS_CANCELLED


def test_a_call_that_ended_well_before_its_cancel_is_told_as_it_was(play: Play) -> None:
    worker, link = play.attach("w", "echo")
    play.call("c1")
    told = play.cancel("c1")
    play.finish(worker, link.calls[0])
    assert play.caller.reasons == ["TOOL_STATUS_OK"]
    assert [(outcome.found, outcome.acknowledged) for outcome in told] == [(True, False)]


def test_a_cancelled_call_in_line_never_runs(play: Play) -> None:
    worker, link = play.attach("w", "echo", concurrency=1)
    play.call("c1")
    play.call("c2")
    assert [(outcome.found, outcome.acknowledged) for outcome in play.cancel("c2")] == [(True, True)]
    play.finish(worker, link.calls[0])
    assert link.call_ids == ["c1"]
    assert play.caller.reasons == ["TOOL_CANCELLED", "TOOL_STATUS_OK"]


def test_a_cancelled_call_is_not_executed_again(play: Play) -> None:
    worker, link = play.attach("w1", "echo", concurrency=1)
    play.call("c1")
    _, other = play.attach("w2", "echo")
    told = play.cancel("c1")
    play.board.detach(worker, link, now=play.now, returns=True)
    assert other.calls == []
    assert play.caller.reasons == ["TOOL_CANCELLED"]
    assert [outcome.acknowledged for outcome in told] == [False]


def test_a_foreign_or_unknown_call_is_not_found(play: Play) -> None:
    _, link = play.attach("w", "echo")
    play.call("c1", tenant="acme")
    for told in (play.cancel("c1", tenant="globex"), play.cancel("c9")):
        assert [(outcome.found, outcome.acknowledged) for outcome in told] == [(False, False)]
    assert link.cancelled == []
