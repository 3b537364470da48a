"""A run's journal over a real wire: appends in order, sent again while nothing is decided, one refusal that counts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from mainspring.v1 import events_pb2
from mainspring.v1 import state_pb2 as pb
from mainspring.v1 import state_pb2_grpc as rpc
from mainspring_execution.core.progress import fold
from mainspring_execution.core.record import Envelope
from mainspring_execution.engine.attention import Attention
from mainspring_execution.engine.journal import EVENTS_PER_APPEND_MAX, Journal
from mainspring_execution.peers import AppendPool, State
from mainspring_kit.channel import Peer
from mainspring_kit.config import ServiceSettings
from mainspring_kit.errors import MainspringError, Reason, to_status
from mainspring_kit.identity import ServiceTokens, new_id
from mainspring_kit.server import Service, serving
from mainspring_kit.streams import BatchPool, Replies, serve_batches
from mainspring_kit.tasks import background

from test_framework.waiting import wait_until

pytestmark = pytest.mark.contract

AUTH, SERVICE = "dev-" + "a" * 40, "dev-" + "s" * 40
ENVELOPE = Envelope(new_id(), "talk-1", "lookup", "0af7651916cd43dd8448eb211c80319c")

UNREACHED = MainspringError(Reason.PEER_UNAVAILABLE, "The database is away.", peer="postgres")
STALE = MainspringError(Reason.APPEND_STALE, "Not yours.", run_id=ENVELOPE.run_id, expected_seq=1)
REFUSED = MainspringError(Reason.EVENT_REFUSED, "No such value.", run_id=ENVELOPE.run_id, detail="a check")


class Log(rpc.StateServiceServicer):
    """A state process that only takes appends: it answers as `verdict` says, and keeps what it was sent."""

    def __init__(self) -> None:
        self.seen: list[pb.Append] = []
        self.verdict: Callable[[pb.Append], MainspringError | None] = lambda _: None

    async def Append(
        self, request_iterator: AsyncIterator[pb.AppendRequest], context: object
    ) -> AsyncIterator[pb.AppendResponse]:
        yield pb.AppendResponse(state_id="state-1")
        replies = Replies[pb.AppendResult]("appends", 8_192)

        def receive(frame: pb.AppendRequest) -> None:
            replies.expect(len(frame.appends))
            for append in frame.appends:
                self.seen.append(append)
                error = self.verdict(append)
                status = to_status(error) if error is not None else None
                replies.put(pb.AppendResult(item_id=append.item_id, status=status))

        async for response in serve_batches(
            request_iterator, replies, receive=receive, frame=lambda results: pb.AppendResponse(results=results)
        ):
            yield response

    def ranges(self) -> list[tuple[int, int]]:
        """First and last seq of each append that came."""
        return [(append.events[0].seq, append.events[-1].seq) for append in self.seen]


Log.__abstractmethods__ = frozenset()  # what is not overridden answers UNIMPLEMENTED, as in the services


@dataclass
class Desk:
    """A journal and the state process that it writes to."""

    log: Log
    pool: AppendPool
    attention: Attention = field(default_factory=Attention)

    def __post_init__(self) -> None:
        self.journal = Journal(
            self.pool, ENVELOPE, tenant_id="acme", epoch=1, state_id="state-1", attention=self.attention
        )

    def write(self, count: int = 1) -> None:
        """Records events and sends them as one append."""
        for _ in range(count):
            self.journal.record(agent_thinking=events_pb2.AgentThinking(text="hm"))
        self.journal.flush()

    async def settled(self) -> None:
        """Until every append was answered well."""
        await wait_until(lambda: self.journal.is_settled)


@asynccontextmanager
async def desk(queue_max: int = 1_000) -> AsyncIterator[Desk]:
    """A desk over a real stream."""
    settings = ServiceSettings(
        listen="127.0.0.1:0", auth_secret=AUTH, service_secret=SERVICE, environment="development", drain_seconds=0
    )
    log = Log()  # type: ignore[abstract]  # serves a part of the contract
    service = Service(pb.DESCRIPTOR.services_by_name["StateService"], rpc.add_StateServiceServicer_to_server, log)
    async with (
        serving(settings, [service]) as port,
        Peer(f"127.0.0.1:{port}", ServiceTokens(SERVICE, "execution")) as peer,
    ):
        pool = State(peer).appends
        if queue_max < 1_000:
            pool = BatchPool(
                peer,
                "appends",
                open_call=lambda channel: rpc.StateServiceStub(channel).Append(**peer.stream()),
                frame=lambda items: pb.AppendRequest(appends=items),
                unpack=lambda response: (response.results, response.state_id),
                queue_max=queue_max,
            )
        async with background(pool.run()):
            await wait_until(lambda: pool.is_live)
            yield Desk(log, pool)


async def test_appends_follow_each_other_without_being_awaited() -> None:
    async with desk() as at:
        at.write(1)
        at.write(2)
        at.write(3)
        await at.settled()
        assert at.log.ranges() == [(1, 1), (2, 3), (4, 6)]
        assert [append.expected_seq for append in at.log.seen] == [0, 1, 3]
        assert all(event.append_id == append.append_id for append in at.log.seen for event in append.events)


async def test_an_append_is_never_larger_than_state_takes() -> None:
    async with desk() as at:
        at.write(EVENTS_PER_APPEND_MAX + 1)
        at.journal.record(agent_thinking=events_pb2.AgentThinking(text="x" * (2 << 20)))
        at.write(1)
        await at.settled()
        assert at.log.ranges() == [(1, 64), (65, 65), (66, 66), (67, 67)]


async def test_what_was_not_decided_is_sent_again_in_order_under_the_same_ids() -> None:
    async with desk() as at:
        verdicts: list[MainspringError | None] = [UNREACHED, STALE]
        at.log.verdict = lambda _: verdicts.pop(0) if verdicts else None
        at.write()
        at.write()
        await at.settled()
        assert at.log.ranges() == [(1, 1), (2, 2), (1, 1), (2, 2)]
        assert [append.append_id for append in at.log.seen[:2]] == [append.append_id for append in at.log.seen[2:]]
        assert at.journal.trouble is None
        assert not at.attention.is_troubled


async def test_a_full_queue_is_waited_for_like_a_state_that_is_away() -> None:
    async with desk(queue_max=1) as at:
        at.write()
        at.write()
        at.write()
        assert not at.journal.is_settled
        await at.settled()
        assert at.log.ranges() == [(1, 1), (2, 2), (3, 3)]


async def test_the_first_refusal_is_the_trouble_and_a_restored_journal_goes_on() -> None:
    async with desk() as at:
        at.log.verdict = lambda append: {1: REFUSED, 2: STALE}.get(append.expected_seq)
        at.write()
        at.write()
        at.write()
        await at.journal.wait_answered()
        await wait_until(lambda: at.attention.is_troubled)
        assert at.journal.trouble is not None
        assert at.journal.trouble.reason_name == "EVENT_REFUSED"
        at.journal.restore(fold(at.log.seen[0].events))
        at.log.verdict = lambda _: None
        at.write()
        await at.settled()
        assert at.log.ranges()[-1] == (2, 2)
