"""Over a real wire: no model is asked for another's run, and no start is given up that may be durable."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import pytest
from google.rpc import code_pb2
from mainspring.v1 import execution_pb2, registry_pb2, types_pb2
from mainspring.v1 import state_pb2 as pb
from mainspring.v1 import state_pb2_grpc as rpc
from mainspring_execution.core.plan import AgentPlan
from mainspring_execution.core.thought import Thought, Turn
from mainspring_execution.engine.catalog import Catalog, PreparedAgent
from mainspring_execution.engine.claims import Claims
from mainspring_execution.engine.deltas import Deltas
from mainspring_execution.engine.journal import UNANSWERED_APPENDS_MAX
from mainspring_execution.engine.lease import Lease
from mainspring_execution.engine.runs import Runs
from mainspring_execution.engine.surroundings import Surroundings
from mainspring_execution.peers import Dispatcher, State
from mainspring_kit.channel import Peer
from mainspring_kit.config import ServiceSettings
from mainspring_kit.errors import MainspringError, Reason, from_status, to_status
from mainspring_kit.identity import ServiceTokens, UserExecutionContext, new_id
from mainspring_kit.server import Service, serving
from mainspring_kit.streams import BatchPool, Replies, serve_batches
from mainspring_kit.tasks import background

from test_framework.waiting import wait_until

pytestmark = pytest.mark.contract

AUTH, SERVICE = "dev-" + "a" * 40, "dev-" + "s" * 40
RUNS_MAX = 10
UNREACHED = MainspringError(Reason.PEER_UNAVAILABLE, "The database is away.", peer="postgres")
FULL = MainspringError(Reason.QUEUE_FULL, "Too many appends wait.", queue="appends", limit=1)


class HalfState(rpc.StateServiceServicer):
    """A state process without tables: it takes appends, answers beats and hands out claims as it is told to."""

    def __init__(self) -> None:
        self.seen: list[pb.Append] = []
        self.holds: Callable[[pb.Append], bool] = lambda _: False
        self.verdicts: list[MainspringError] = []
        self.beats = True
        self.claims: list[pb.ClaimedRun] = []
        # Of every run, for whoever asks.
        self.epoch = 1
        self.asked = 0
        self._held: list[tuple[Replies[pb.AppendResult], pb.Append]] = []

    @property
    def held(self) -> int:
        """How many appends await their answer."""
        return len(self._held)

    def release(self) -> None:
        """Answers what was held, and from now on at once."""
        self.holds = lambda _: False
        for replies, append in self._held:
            self._answer(replies, append)
        self._held.clear()

    async def Append(
        self, request_iterator: AsyncIterator[pb.AppendRequest], context: object
    ) -> AsyncIterator[pb.AppendResponse]:
        yield pb.AppendResponse(state_id="state-1")
        replies = Replies[pb.AppendResult]("appends", 8_192)

        def receive(frame: pb.AppendRequest) -> None:
            replies.expect(len(frame.appends))
            for append in frame.appends:
                self.seen.append(append)
                if self.holds(append):
                    self._held.append((replies, append))
                else:
                    self._answer(replies, append)

        async for response in serve_batches(
            request_iterator, replies, receive=receive, frame=lambda results: pb.AppendResponse(results=results)
        ):
            yield response

    async def Heartbeat(
        self, request_iterator: AsyncIterator[pb.HeartbeatRequest], context: object
    ) -> AsyncIterator[pb.HeartbeatResponse]:
        async for request in request_iterator:
            if self.beats:
                response = pb.HeartbeatResponse(beat=request.beat)
                response.lease.FromMilliseconds(2_500)
                yield response

    async def ClaimRuns(self, request: pb.ClaimRunsRequest, context: object) -> AsyncIterator[pb.ClaimRunsResponse]:
        claims, self.claims = self.claims, []
        yield pb.ClaimRunsResponse(runs=claims)

    async def GetRun(self, request: pb.GetRunRequest, context: object) -> pb.GetRunResponse:
        self.asked += 1
        return pb.GetRunResponse(run=types_pb2.Run(run_id=request.run_id, epoch=self.epoch))

    async def ReadEvents(self, request: pb.ReadEventsRequest, context: object) -> pb.ReadEventsResponse:
        return pb.ReadEventsResponse()

    def _answer(self, replies: Replies[pb.AppendResult], append: pb.Append) -> None:
        status = to_status(self.verdicts.pop(0)) if self.verdicts else None
        replies.put(
            pb.AppendResult(
                item_id=append.item_id, run_id=append.run_id, state=types_pb2.RUN_STATE_RUNNING, status=status
            )
        )


HalfState.__abstractmethods__ = frozenset()  # what is not overridden answers UNIMPLEMENTED, as in the services


class Endless:
    """A model that never comes to a result, and the catalog of the one agent that has it."""

    needs_history = False
    needs_tools = False
    fallbacks = repairs = 0

    def __init__(self) -> None:
        self.steps: list[int] = []
        plan = AgentPlan("endless", "1", "none", {}, "", frozenset(), None, timeout_seconds=300, steps_max=20)
        self._agent = PreparedAgent(plan, self)

    def rank(self, name: str) -> int:
        """There is one."""
        return 0

    def waits(self, step: int) -> bool:
        return True

    async def think(self, turn: Turn, emit: Callable[[str], None]) -> Thought:
        self.steps.append(turn.step)
        return Thought(model="none", text="hm", usage=types_pb2.Usage())

    async def resolve(self, context: object, name: str, *, alias: str = "", version: str = "") -> PreparedAgent:
        return self._agent

    async def recall(self, context: object, name: str, *, version: str) -> PreparedAgent:
        return self._agent

    async def limits_of(self, context: object) -> registry_pb2.TenantLimits:
        return registry_pb2.TenantLimits()


class Crowded(BatchPool[pb.Append, pb.AppendResult]):
    """A queue with room for one, which somebody else takes as soon as the first append was answered."""

    refused = 0
    _is_crowded = False

    # Any: as BatchPool says.
    def post(self, item: pb.Append, **options: Any) -> Any:
        try:
            future = super().post(item, **options)
        except MainspringError:
            self.refused += 1
            raise
        if not self._is_crowded:
            self._is_crowded = True
            future.add_done_callback(lambda _: self.post(pb.Append(append_id=new_id(), run_id="another")))
        return future


@dataclass
class Executor:
    """An executor's engine over half a state process."""

    state: HalfState
    peer: Peer
    around: Surroundings
    runs: Runs
    model: Endless

    async def lapse(self) -> None:
        """The lease is lost, and held again."""
        await self.lose()
        self.state.beats = True
        await wait_until(lambda: self.around.lease.is_held)

    async def lose(self) -> None:
        """The lease is lost."""
        self.state.beats = False
        await wait_until(lambda: not self.around.lease.is_held)

    def start(self) -> list[execution_pb2.StartResult]:
        """Starts a run; the answer will be in the list."""
        answers: list[execution_pb2.StartResult] = []
        context = UserExecutionContext("acme", "ann", "talk", new_id(), new_id())
        start = execution_pb2.StartRunRequest(agent="endless", input=b"{}")
        self.runs.start(execution_pb2.StartItem(item_id=1, context=context.to_message(), start=start), answers.append)
        return answers

    def hand_over(self, *epochs: int) -> None:
        """A run whose turn has come is claimed for this executor; the claims arrive in this order."""
        run = types_pb2.Run(
            run_id=new_id(), tenant_id="acme", user_id="ann", session_id="talk", agent="endless", agent_version="1"
        )
        run.state, run.input = types_pb2.RUN_STATE_RUNNING, b"{}"
        for run.epoch in epochs:
            self.state.claims.append(pb.ClaimedRun(run=run))

    async def is_left(self) -> None:
        """Until no run is under way here any more."""
        await wait_until(lambda: self.runs.room == RUNS_MAX)


@asynccontextmanager
async def executing() -> AsyncIterator[Executor]:
    """An executor that holds its lease."""
    settings = ServiceSettings(
        listen="127.0.0.1:0", auth_secret=AUTH, service_secret=SERVICE, environment="development", drain_seconds=0
    )
    half = HalfState()  # type: ignore[abstract]  # serves a part of the contract
    service = Service(pb.DESCRIPTOR.services_by_name["StateService"], rpc.add_StateServiceServicer_to_server, half)
    async with (
        serving(settings, [service]) as port,
        Peer(f"127.0.0.1:{port}", ServiceTokens(SERVICE, "execution")) as peer,
    ):
        state, model = State(peer), Endless()
        lease = Lease(state, "executor-1")
        around = Surroundings(state, Dispatcher(peer), cast(Catalog, model), lease, Deltas(state))
        runs = Runs(around, runs_max=RUNS_MAX)
        claims = Claims(around, runs)
        async with background(state.appends.run(), lease.beat(runs.take_input), claims.run()) as tasks:
            runs.open(tasks)
            await lease.wait_held()
            await wait_until(lambda: state.appends.is_live)
            yield Executor(half, peer, around, runs, model)


async def test_a_claimed_run_is_begun_by_an_event_that_is_taken_and_by_nothing_else() -> None:
    async with executing() as at:
        at.state.holds = lambda _: True
        at.hand_over(2)
        await wait_until(lambda: at.state.held == 1)
        at.state.verdicts = [MainspringError(Reason.APPEND_STALE, "Not yours.", run_id="r", expected_seq=0)]
        at.state.epoch = 3
        at.state.release()
        await at.is_left()
        assert at.model.steps == []


@pytest.mark.parametrize("is_claimed", [False, True])
async def test_a_lapse_while_the_first_append_is_under_way_makes_the_executor_ask(*, is_claimed: bool) -> None:
    async with executing() as at:
        at.state.holds = lambda _: True
        if is_claimed:
            at.hand_over(2)
        else:
            at.start()
        await wait_until(lambda: at.state.held == 1)
        await at.lapse()
        at.state.epoch = 3
        at.state.release()
        await at.is_left()
        assert at.state.asked
        assert at.model.steps == []


async def test_an_older_claim_that_comes_late_does_not_take_the_run_from_the_newer_one() -> None:
    async with executing() as at:
        at.hand_over(3, 2)
        await wait_until(lambda: at.state.seen)
        await at.is_left()
        assert at.state.seen[-1].events[-1].HasField("agent_failed"), "it has no more steps"
        assert {append.epoch for append in at.state.seen} == {3}


async def test_the_lease_is_looked_at_after_the_wait_for_appends_that_are_behind() -> None:
    async with executing() as at:
        at.state.holds = lambda append: not append.HasField("create")
        at.start()
        await wait_until(lambda: at.state.held == UNANSWERED_APPENDS_MAX)
        await at.lose()
        asked = list(at.model.steps)
        at.state.epoch = 2
        at.state.release()
        at.state.beats = True
        await at.is_left()
        assert at.model.steps == asked


async def test_a_create_without_a_verdict_is_sent_again_also_where_the_queue_is_full_then() -> None:
    async with executing() as at:
        at.state.verdicts = [UNREACHED, FULL]
        answers = at.start()
        await wait_until(lambda: answers)
        assert answers[0].status.code == code_pb2.OK
        assert len({append.append_id for append in at.state.seen if append.HasField("create")}) == 1
        await wait_until(lambda: at.model.steps)


async def test_a_create_without_a_verdict_waits_for_room_in_the_own_queue() -> None:
    async with executing() as at:
        pool = Crowded(
            at.peer,
            "appends",
            open_call=lambda channel: rpc.StateServiceStub(channel).Append(**at.peer.stream()),
            frame=lambda items: pb.AppendRequest(appends=items),
            unpack=lambda response: (response.results, response.state_id),
            queue_max=1,
        )
        async with background(pool.run()):
            await wait_until(lambda: pool.is_live)
            at.around.state.appends = pool
            at.state.holds = lambda append: append.run_id == "another"
            at.state.verdicts = [UNREACHED]
            answers = at.start()
            await wait_until(lambda: pool.refused)
            assert not answers
            at.state.release()
            await wait_until(lambda: answers)
            assert answers[0].status.code == code_pb2.OK


async def test_a_create_that_meets_a_full_queue_first_is_refused() -> None:
    async with executing() as at:
        at.state.verdicts = [FULL]
        answers = at.start()
        await wait_until(lambda: answers)
        assert from_status(answers[0].status).reason_name == "QUEUE_FULL"
