"""Unfinished text on its way to a run's watchers: live, so far for who comes late, and never in place of an event."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from mainspring.v1 import events_pb2, types_pb2
from mainspring_execution.engine.deltas import Deltas
from mainspring_execution.peers import State
from mainspring_kit.channel import Peer
from mainspring_kit.identity import ServiceTokens, UserExecutionContext
from mainspring_kit.tasks import background
from mainspring_state.core.drafts import DRAFT_BYTES_MAX

from test_framework.identities import Identities
from test_framework.waiting import wait_until
from tests.contract.conftest import SERVICE_SECRET
from tests.contract.state_calls import Executor, Publisher, Watcher, Wiring, completed, person, thinking, wiring

pytestmark = pytest.mark.contract
grpc_service = "State"

# Any in this module: generated stubs have no common base.


@pytest.fixture(scope="module")
def grpc_wiring(contract_environment: dict[str, Any]) -> Wiring:
    """The state service's own; its streams hold little, so that a slow reader is one soon."""
    return wiring(contract_environment, follow_deliveries_max=200, follow_bytes_max=1 << 20)


@pytest.fixture
async def publisher(aio_stub: Any, identities: Identities) -> AsyncIterator[Publisher]:
    """An executor's stream of text."""
    opened = Publisher(aio_stub, identities)
    yield opened
    opened.close()


@pytest.fixture
async def watcher(aio_stub: Any, identities: Identities, user: UserExecutionContext) -> AsyncIterator[Watcher]:
    """The user's own Follow stream."""
    opened = Watcher(aio_stub, identities.metadata(user.tenant_id, user.user_id))
    yield opened
    opened.close()


def deltas(watcher: Watcher, run_id: str, number: int | None = None) -> list[events_pb2.TextDelta]:
    """What came of a run's text, of one subscription or of all."""
    return [
        delta
        for delivery in watcher.deliveries
        if delivery.run_id == run_id and (number is None or delivery.subscription_id == number)
        for delta in delivery.deltas
    ]


def text(watcher: Watcher, run_id: str, number: int | None = None) -> str:
    """The text as a client puts it together."""
    known = ""
    for delta in deltas(watcher, run_id, number):
        assert delta.offset <= len(known)
        known = known[: delta.offset] + delta.text
    return known


async def followed(executor: Executor, watcher: Watcher, user: UserExecutionContext, **fields: Any) -> str:
    """A run that the watcher follows live."""
    run_id = await executor.start(user, **fields)
    await watcher.subscribe(run_id, number=len(watcher.deliveries) + 1)
    await watcher.until_caught_up(len(watcher.deliveries) + 1)
    return run_id


async def test_a_publishers_stream_names_the_process_and_ends_when_it_is_done(publisher: Publisher) -> None:
    assert (await publisher.first()).state_id
    assert await publisher.end() is grpc.StatusCode.OK


async def test_text_comes_to_who_watches_and_then_its_event(
    executor: Executor, publisher: Publisher, watcher: Watcher, user: UserExecutionContext
) -> None:
    run_id = await followed(executor, watcher, user)
    await publisher.write(user, run_id, "Grüße, ")
    await publisher.write(user, run_id, "🌍 und", offset=7)
    await publisher.write(user, run_id, " mehr", offset=12)
    await watcher.until(lambda: text(watcher, run_id) == "Grüße, 🌍 und mehr")
    assert {delta.step for delta in deltas(watcher, run_id)} == {1}
    await executor.go_on(user, run_id, thinking("Grüße, 🌍 und mehr."), after=1)
    await watcher.until_seq(2)


async def test_who_comes_late_gets_the_text_so_far_and_what_follows(
    executor: Executor, publisher: Publisher, watcher: Watcher, user: UserExecutionContext
) -> None:
    run_id = await followed(executor, watcher, user)
    await publisher.write(user, run_id, "So far")
    await watcher.until(lambda: text(watcher, run_id) == "So far")
    await watcher.subscribe(run_id, number=7)
    await watcher.until(lambda: bool(deltas(watcher, run_id, 7)))
    own = [delivery for delivery in watcher.deliveries if delivery.subscription_id == 7]
    assert [delivery.HasField("caught_up_seq") for delivery in own] == [False, True, False]
    assert [(delta.offset, delta.text) for delta in deltas(watcher, run_id, 7)] == [(0, "So far")]
    await publisher.write(user, run_id, ", so good", offset=6)
    await watcher.until(lambda: text(watcher, run_id) == "So far, so good")
    # Once for both of them.
    assert [delta.text for delta in deltas(watcher, run_id, 0)] == ["So far", ", so good"]


async def test_text_that_nobody_watched_is_there_for_the_first_who_comes(
    executor: Executor, publisher: Publisher, watcher: Watcher, user: UserExecutionContext
) -> None:
    run_id = await executor.start(user)
    other = await followed(executor, watcher, replace(user, session_id=f"{user.session_id}-2"))
    await publisher.write(user, run_id, "Alone")
    await publisher.write(user, other, "a mark")
    await watcher.until(lambda: text(watcher, other) == "a mark")
    await watcher.subscribe(run_id, number=9)
    await watcher.until(lambda: text(watcher, run_id, 9) == "Alone")


async def test_the_steps_event_ends_its_text_for_good(
    executor: Executor, publisher: Publisher, watcher: Watcher, user: UserExecutionContext
) -> None:
    run_id = await followed(executor, watcher, user)
    await publisher.write(user, run_id, "Half a ")
    await watcher.until(lambda: bool(text(watcher, run_id)))
    await executor.go_on(user, run_id, thinking("Half a sentence."), after=1)
    await watcher.until_seq(2)
    # What a slower stream brings afterwards, and what begins the step anew there.
    await publisher.write(user, run_id, "sentence.", offset=7)
    await publisher.write(user, run_id, "Half")
    await publisher.write(user, run_id, "Next", step=2)
    await watcher.until(lambda: 2 in {delta.step for delta in deltas(watcher, run_id)})
    assert [(delta.step, delta.text) for delta in deltas(watcher, run_id)] == [(1, "Half a "), (2, "Next")]
    await watcher.subscribe(run_id, number=9)
    await watcher.until(lambda: bool(deltas(watcher, run_id, 9)))
    assert [(delta.step, delta.text) for delta in deltas(watcher, run_id, 9)] == [(2, "Next")]


async def test_an_outcome_of_the_step_before_does_not_end_the_text(
    executor: Executor, publisher: Publisher, watcher: Watcher, user: UserExecutionContext
) -> None:
    run_id = await followed(executor, watcher, user)
    await executor.go_on(user, run_id, thinking(), after=1)
    await publisher.write(user, run_id, "One ", step=2)
    await watcher.until(lambda: text(watcher, run_id) == "One ")
    outcome = events_pb2.RunEvent(
        tool_completed=events_pb2.ToolCompleted(call_id="c", tool="t", status=types_pb2.TOOL_STATUS_OK)
    )
    await executor.go_on(user, run_id, outcome, after=2)
    await publisher.write(user, run_id, "two", step=2, offset=4)
    await watcher.until(lambda: text(watcher, run_id) == "One two")


async def test_another_attempt_begins_the_text_again(
    executor: Executor, publisher: Publisher, watcher: Watcher, user: UserExecutionContext
) -> None:
    run_id = await followed(executor, watcher, user)
    await publisher.write(user, run_id, "A first try")
    await watcher.until(lambda: bool(text(watcher, run_id)))
    await publisher.write(user, run_id, "A second")
    await watcher.until(lambda: text(watcher, run_id) == "A second")
    assert [delta.offset for delta in deltas(watcher, run_id)] == [0, 0]


async def test_text_without_its_beginning_is_not_shown(
    executor: Executor, publisher: Publisher, watcher: Watcher, user: UserExecutionContext
) -> None:
    run_id = await followed(executor, watcher, user)
    await publisher.write(user, run_id, "the end", offset=20)
    await publisher.write(user, run_id, "x" * DRAFT_BYTES_MAX)
    await publisher.write(user, run_id, "All", step=2)
    await watcher.until(lambda: text(watcher, run_id) == "All")
    assert [delta.text for delta in deltas(watcher, run_id)] == ["All"]


async def test_text_under_anothers_name_reaches_nobody(
    executor: Executor, publisher: Publisher, watcher: Watcher, user: UserExecutionContext
) -> None:
    run_id = await followed(executor, watcher, user)
    await publisher.write(person(user.tenant_id), run_id, "of a colleague")
    await publisher.write(person(), run_id, "of a stranger")
    await publisher.write(user, run_id, "one's own")
    await watcher.until(lambda: bool(deltas(watcher, run_id)))
    assert [delta.text for delta in deltas(watcher, run_id)] == ["one's own"]


async def test_text_of_a_run_is_not_shown_to_who_may_not_see_it(
    executor: Executor, publisher: Publisher, watcher: Watcher, user: UserExecutionContext
) -> None:
    other = person(user.tenant_id)
    foreign, own = await executor.start(other), await followed(executor, watcher, user)
    await watcher.subscribe(foreign, number=9)
    await watcher.until_refused(9)
    await publisher.write(other, foreign, "private")
    await publisher.write(user, own, "mine")
    await watcher.until(lambda: bool(text(watcher, own)))
    assert deltas(watcher, foreign) == []


async def test_a_slow_reader_gets_longer_pieces_and_keeps_its_stream(
    aio_stub: Any, executor: Executor, publisher: Publisher, identities: Identities, user: UserExecutionContext
) -> None:
    slow = Watcher(aio_stub, identities.metadata(user.tenant_id, user.user_id))
    sessions = [replace(user, session_id=f"{user.session_id}-{number}") for number in range(8)]
    run_ids = [await followed(executor, slow, session) for session in sessions]
    piece, count = "0123456789" * 500, 180
    for number in range(count):
        for run_id in run_ids:
            await publisher.write(user, run_id, piece, offset=number * len(piece))
    # Many times what the stream may hold and what the wire takes: 7 MB, in more pieces than it may hold deliveries.
    for run_id in run_ids:
        await slow.until(lambda wanted=run_id: text(slow, wanted) == piece * count)  # type: ignore[misc]  # of this turn
    assert sum(len(deltas(slow, run_id)) for run_id in run_ids) < len(run_ids) * count * 0.9
    await executor.go_on(user, run_ids[0], completed(), after=1)
    await slow.until_seq(2)
    slow.close()


async def test_what_an_executor_writes_arrives_as_it_was_written(
    executor: Executor, watcher: Watcher, user: UserExecutionContext, grpc_addr: str
) -> None:
    run_id = await followed(executor, watcher, user)
    async with Peer(grpc_addr, ServiceTokens(SERVICE_SECRET, "execution")) as peer:
        sender = Deltas(State(peer))
        async with background(sender.run()):
            await wait_until(lambda: sender.is_live)
            write = sender.writer(user, run_id, step=1)
            for piece in ("Not a ", "\ud83d", "", " pair, ", "and 🌍"):
                write(piece)
            await watcher.until(lambda: text(watcher, run_id) == "Not a ? pair, and 🌍")
            # One turn of the loop, one frame, one piece.
            assert len(deltas(watcher, run_id)) == 1
            sender.writer(user, run_id, step=1)("Again")
            await watcher.until(lambda: text(watcher, run_id) == "Again")
