"""Hypothesis drives a real state process and the model of its database with the same calls: they must agree on all."""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, rule, run_state_machine_as_test
from mainspring.v1 import events_pb2, state_pb2, types_pb2
from mainspring_kit import postgres
from mainspring_kit.errors import from_rpc_error
from mainspring_kit.identity import UserExecutionContext, new_id
from mainspring_state.store.leases import UNCONSUMED_MAX, Leases

from test_framework.grpc_testing import stub_class
from test_framework.identities import Identities, make_context, unique
from test_framework.loop_thread import LoopThread
from tests.contract.state_calls import (
    Executor,
    Watcher,
    Wiring,
    cancelled,
    completed,
    executing,
    person,
    reason_of,
    started,
    thinking,
    wiring,
)
from tests.contract.state_inputs import ALLOW, WITHDRAWN, asking, paused, resolved, resumed, signalled, waiting
from tests.contract.state_model import ModelState, in_order, real_tables, said

pytestmark = pytest.mark.contract
grpc_service = "State"

# Any in this module: generated stubs have no common base.

# Ceilings that no machine reaches, however slow: of one answer, and of all that an example takes.
ANSWER_SECONDS, EXAMPLE_SECONDS = 50.0, 500.0
STALLED_MAX, PAGE_MAX, CREDIT = 3, 64, 1_000
LEASE_SECONDS = 600.0
EXECUTORS = (0, 1)
# What may be asked of runs, an answer to an approval beside it.
ASKED: dict[str, dict[str, Any]] = {
    "cancel": {"cancel": state_pb2.CancelInput()},
    "pause": {"pause": state_pb2.PauseInput()},
    "resume": {"resume": state_pb2.ResumeInput()},
    "signal": {"signal": state_pb2.SignalInput(name="s")},
}
# When runs that start later than now do.
LATE = Timestamp(seconds=4_000_000_000)
EARLY = datetime(1970, 1, 1, tzinfo=UTC)
REASONS = {
    "": "", "ended": "RUN_ENDED", "reused": "IDEMPOTENCY_KEY_REUSED", "illegal": "TRANSITION_ILLEGAL",
    "role": "ROLE_REQUIRED", "resolved": "APPROVAL_RESOLVED",
}  # fmt: skip
REQUESTS = ["r1", "r2", "r3"]
KINDS = (
    "started", "thinking", "executing", "recovered", "completed", "failed", "cancelled", "waiting", "paused", "resumed",
    "signalled", "asked", "resolved",
)  # fmt: skip
ENDS = frozenset({"agent_completed", "agent_failed", "agent_cancelled", "agent_timed_out"})


@pytest.fixture(scope="module")
def grpc_wiring(contract_environment: dict[str, Any]) -> Wiring:
    """The service's own; nobody dies of silence, only of saying goodbye."""
    return wiring(contract_environment, lease_seconds=LEASE_SECONDS, broken_lease_seconds=LEASE_SECONDS)


class Bench:
    """What all examples share: the process under test, a connection beside it, and a loop."""

    def __init__(self, address: str, identities: Identities, owner_url: str, loop: LoopThread) -> None:
        self.address = address
        self.identities = identities
        self.owner_url = owner_url
        self.loop = loop


class Claims:
    """One stream of claims, and what came down it and was not looked at yet."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._runs: deque[types_pb2.Run] = deque()

    async def take(self, count: int) -> list[types_pb2.Run]:
        """The next so many runs."""
        async with asyncio.timeout(ANSWER_SECONDS):
            while len(self._runs) < count:
                self._runs += [claimed.run for claimed in (await self._call.read()).runs]
        return [self._runs.popleft() for _ in range(count)]


class Session:
    """One example's streams, all on the bench's loop."""

    def __init__(self, stub: Any, bench: Bench, executors: list[Executor], connection: Any) -> None:
        self.stub = stub
        self.bench = bench
        self.executors = executors
        self.connection = connection
        self.beats: list[Any] = []
        self.watchers: list[tuple[Watcher, str, int]] = []

    @classmethod
    @asynccontextmanager
    async def opened(cls, bench: Bench) -> AsyncIterator[Session]:
        """Opens them while the block runs."""
        async with AsyncExitStack() as stack:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(bench.address))
            stub = stub_class("State")(channel)
            executors = [
                await stack.enter_async_context(executing(stub, bench.identities, timeout=EXAMPLE_SECONDS))
                for _ in EXECUTORS
            ]
            connection = await asyncpg.connect(bench.owner_url)
            stack.push_async_callback(connection.close)
            session = cls(stub, bench, executors, connection)
            for executor in executors:
                await asyncio.wait_for(executor.greeted.wait(), ANSWER_SECONDS)
                metadata = bench.identities.service_metadata()
                session.beats.append(stub.Heartbeat(metadata=metadata, timeout=EXAMPLE_SECONDS))
                await session.beat(executor)
            yield session
            for call in session.beats:
                call.cancel()
            for watcher, _, _ in session.watchers:
                watcher.close()
            # Nothing is left for a later example's executors to claim.
            await connection.execute("DELETE FROM state.leases; DELETE FROM state.ready; DELETE FROM state.executors")

    async def beat(self, executor: Executor, *, leaving: bool = False) -> None:
        """Says that an executor lives, or that it leaves; until that is stored."""
        call = self.beats[self.executors.index(executor)]
        await call.write(state_pb2.HeartbeatRequest(executor_id=executor.executor_id, beat=1, leaving=leaving))
        async with asyncio.timeout(ANSWER_SECONDS):
            while not (await call.read()).beat:
                pass

    @asynccontextmanager
    async def claiming(self, executor: Executor) -> AsyncIterator[Claims]:
        """A stream of claims while the block runs; after it, nothing is claimed for the stream any more."""
        mark = executor.executor_id
        await self.connection.execute(
            """INSERT INTO state.leases (run_id, epoch, tenant_id, executor_id, claim_state_id)
            VALUES ($1, 1, $2, $2, $3)""",
            *(new_id(), mark, executor.state_id),
        )
        request = state_pb2.ClaimRunsRequest(executor_id=executor.executor_id, credit=CREDIT)
        metadata = self.bench.identities.service_metadata()
        call = self.stub.ClaimRuns(request, metadata=metadata, timeout=EXAMPLE_SECONDS)
        try:
            yield Claims(call)
        finally:
            call.cancel()
        # A stream that was cut may be served for a moment more. The last thing that the process does for it is to
        # disown what was claimed for its executor, this lease of no run too.
        async with asyncio.timeout(ANSWER_SECONDS):
            while await self.connection.fetchval("SELECT claim_state_id FROM state.leases WHERE tenant_id = $1", mark):
                pass
        await self.connection.execute("DELETE FROM state.leases WHERE tenant_id = $1", mark)

    async def tables(self, tenant_id: str) -> dict[str, Any]:
        """What the database holds of the tenant."""
        return await real_tables(self.connection, tenant_id)

    async def ended_log(self, run_id: str) -> list[events_pb2.RunEvent]:
        """The log of a run that the state process itself ends, once it has."""
        async with asyncio.timeout(ANSWER_SECONDS):
            while True:
                rows = await self.connection.fetch(
                    "SELECT event FROM state.events WHERE run_id = $1 ORDER BY seq", run_id
                )
                log = [events_pb2.RunEvent.FromString(row["event"]) for row in rows]
                if log and log[-1].WhichOneof("payload") in ENDS:
                    return log
                await asyncio.sleep(0)

    async def put_input(self, user: UserExecutionContext, run_id: str, request_id: str, **asked: Any) -> str:
        """Asks for something; the reason for which it was refused."""
        request = state_pb2.PutInputRequest(run_id=run_id, request_id=request_id, **asked)
        metadata = self.bench.identities.metadata(user.tenant_id, user.user_id)
        try:
            await self.stub.PutInput(request, metadata=metadata, timeout=ANSWER_SECONDS)
        except grpc.aio.AioRpcError as error:
            return error_reason(error)
        return ""

    async def follow(self, user: UserExecutionContext, run_id: str, after_seq: int) -> None:
        """Follows a run as its user."""
        metadata = self.bench.identities.metadata(user.tenant_id, user.user_id)
        watcher = Watcher(self.stub, metadata, timeout=EXAMPLE_SECONDS)
        await watcher.subscribe(run_id, after=after_seq)
        await watcher.until_caught_up()
        self.watchers.append((watcher, run_id, after_seq))


def error_reason(error: grpc.aio.AioRpcError) -> str:
    """The reason in a failed call's details."""
    return from_rpc_error(error).reason_name


def event_of(kind: str, run_id: str, seq: int) -> events_pb2.RunEvent:
    """An event of a kind; of an approval, the one that is asked for in #2 or, in some runs, by operators alone."""
    if kind == "executing":
        return events_pb2.RunEvent(tool_executing=events_pb2.ToolExecuting(call_id="c", tool="t"))
    if kind == "recovered":
        return events_pb2.RunEvent(run_recovered=events_pb2.RunRecovered(attempt=1))
    if kind == "failed":
        return events_pb2.RunEvent(agent_failed=events_pb2.AgentFailed(error=types_pb2.RunError(reason="R")))
    if kind == "asked":
        return asking(run_id, seq, role="" if seq % 2 else "operator")
    if kind == "resolved":
        return resolved(run_id, max(1, seq - 1), WITHDRAWN)
    made = {
        "started": started, "thinking": thinking, "completed": completed, "cancelled": cancelled, "waiting": waiting,
        "paused": paused, "resumed": resumed, "signalled": signalled,
    }  # fmt: skip
    return made[kind]()


class StateMachine(RuleBasedStateMachine):
    """Executors, users and runs of one tenant; every rule is a call to both."""

    bench: Bench
    appends = Bundle("appends")

    def __init__(self) -> None:
        super().__init__()
        self._opened = self.bench.loop.opened(lambda: Session.opened(self.bench))
        self._session = self._opened.__enter__()
        self._model = ModelState()
        self._tenant_id = unique("tenant")
        self._users = [make_context(self._tenant_id) for _ in range(2)]
        self._log: dict[str, UserExecutionContext] = {}
        for executor in self._session.executors:
            self._model.schema.beat(executor.executor_id, "s", LEASE_SECONDS)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Does something on the bench's loop."""
        return self.bench.loop.run(work)

    def _send(self, executor: Executor, appends: list[state_pb2.Append]) -> list[str]:
        copies = [state_pb2.Append.FromString(append.SerializeToString()) for append in appends]
        results = self.run(executor.send(*appends))
        real = [said(result, reason_of(result.status)) for result in results]
        assert real == self._model.append(copies)
        return [answer.reason for answer in real]

    @rule(
        target=appends,
        user=st.integers(0, 1),
        session=st.sampled_from(["a", "b"]),
        policy=st.sampled_from(list(types_pb2.SessionPolicy.values())),
        key=st.sampled_from(["", "", "k1", "k2"]),
        request_hash=st.sampled_from([b"1", b"2"]),
        executor=st.sampled_from(EXECUTORS),
        caps=st.dictionaries(st.sampled_from(["tenant", "user", "agent"]), st.sampled_from([1, 1, 2, 3])),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        queue_only=st.sampled_from([False, False, False, True]),
        is_late=st.sampled_from([False, False, False, False, True]),
        backlog_max=st.sampled_from([0, 0, 0, 3]),
    )
    def create(
        self, user: int, session: str, policy: int, key: str, request_hash: bytes, executor: int,
        caps: dict[str, int], priority: int, queue_only: bool, is_late: bool, backlog_max: int,
    ) -> state_pb2.Append:  # fmt: skip
        """Makes a run, or finds that a key, the session's policy or the backlog's bound is against it."""
        sender, owner = self._session.executors[executor], self._users[user]
        append = sender.create(
            owner, session_id=session, policy=policy, idempotency_key=key, request_hash=request_hash if key else b"",
            caps=[state_pb2.Cap(scope=scope, limit=limit) for scope, limit in sorted(caps.items())],
            priority=priority, queue_only=queue_only, backlog_max=backlog_max,
        )  # fmt: skip
        if is_late:
            append.create.due_time.CopyFrom(LATE)
        self._log[append.run_id] = owner
        self._send(sender, [append])
        return append

    @rule(append=appends, executor=st.sampled_from(EXECUTORS))
    def repeat(self, append: state_pb2.Append, executor: int) -> None:
        """Sends an append again, maybe through another stream."""
        again = state_pb2.Append.FromString(append.SerializeToString())
        self._send(self._session.executors[executor], [again])

    @rule(
        target=appends,
        first=appends,
        kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
        epoch_offset=st.sampled_from([0, 0, 0, 0, -1, 1]),
        seq_offset=st.sampled_from([0, 0, 0, 0, -1, 1]),
        executor=st.sampled_from(EXECUTORS),
        consumes=st.booleans(),
    )
    def append(
        self,
        first: state_pb2.Append,
        kinds: list[str],
        epoch_offset: int,
        seq_offset: int,
        executor: int,
        consumes: bool,
    ) -> state_pb2.Append:
        """Goes on with a run, in its place or beside it."""
        sender = self._session.executors[executor]
        append = self._next(sender, first, kinds, epoch_offset=epoch_offset, seq_offset=seq_offset)
        if consumes:
            append.consumed_request_ids.extend(REQUESTS[:2])
        self._send(sender, [append])
        return append

    @rule(
        items=st.lists(st.tuples(appends, st.sampled_from(KINDS)), min_size=2, max_size=5),
        executor=st.sampled_from(EXECUTORS),
    )
    def append_many(self, items: list[tuple[state_pb2.Append, str]], executor: int) -> None:
        """Sends several appends in one frame; those of one run follow each other."""
        sender = self._session.executors[executor]
        sent: dict[str, int] = {}
        frame = []
        for first, kind in items:
            append = self._next(sender, first, [kind], seq_offset=sent.get(first.run_id, 0))
            sent[first.run_id] = sent.get(first.run_id, 0) + 1
            frame.append(append)
        self._send(sender, frame)

    def _next(
        self, sender: Executor, first: state_pb2.Append, kinds: list[str], *, epoch_offset: int = 0, seq_offset: int = 0
    ) -> state_pb2.Append:
        run = self._model.schema.runs.get((self._tenant_id, first.run_id), {"last_seq": 0, "epoch": 1})
        after = max(0, run["last_seq"] + seq_offset)
        return sender.append(
            self._log[first.run_id],
            first.run_id,
            *(event_of(kind, first.run_id, seq) for seq, kind in enumerate(kinds, after + 1)),
            after=after,
            epoch=max(1, run["epoch"] + epoch_offset),
        )

    @rule(
        target=appends,
        parent=appends,
        executor=st.sampled_from(EXECUTORS),
        is_foreign=st.sampled_from([False, False, False, True]),
        hook=st.sampled_from(["", "http://hook.test"]),
    )
    def branch(self, parent: state_pb2.Append, executor: int, is_foreign: bool, hook: str) -> state_pb2.Append:
        """Makes a sub-run of a run, or finds that this has ended, never was, or is somebody else's."""
        sender, owner = self._session.executors[executor], self._log[parent.run_id]
        user = next(user for user in self._users if (user is owner) != is_foreign)
        append = sender.create(
            user, session_id="a", parent_run_id=parent.run_id, root_run_id=parent.run_id, parent_call_id="c", depth=1,
            attempt=2, webhook=state_pb2.Webhook(url=hook) if hook else None,
        )  # fmt: skip
        self._log[append.run_id] = user
        self._send(sender, [append])
        return append

    @rule(
        append=appends,
        executor=st.sampled_from(EXECUTORS),
        kinds=st.sampled_from([["waiting"], ["waiting"], ["paused"], ["thinking"], ["asked", "waiting"], []]),
        is_due=st.booleans(),
        consumed=st.lists(st.sampled_from(REQUESTS), max_size=2),
    )
    def release(
        self, append: state_pb2.Append, executor: int, kinds: list[str], is_due: bool, consumed: list[str]
    ) -> None:
        """Its holder lets a run go: it waits, is paused, or is handed back; maybe with nothing new to say."""
        sender = self._session.executors[executor]
        released = self._next(sender, append, kinds)
        released.release.SetInParent()
        released.consumed_request_ids.extend(consumed)
        if is_due:
            released.release.due_time.FromSeconds(1)
        self._send(sender, [released])

    @rule(
        append=appends,
        kind=st.sampled_from(sorted(ASKED)),
        request_id=st.sampled_from(REQUESTS),
        is_foreign=st.sampled_from([False, False, True]),
    )
    def ask(self, append: state_pb2.Append, kind: str, request_id: str, is_foreign: bool) -> None:
        """Somebody asks something of a run: its user, or another who must not know of it."""
        self._ask(append, request_id, is_foreign=is_foreign, **ASKED[kind])

    @rule(append=appends, request_id=st.sampled_from(REQUESTS), is_foreign=st.sampled_from([False, False, True]))
    def answer(self, append: state_pb2.Append, request_id: str, is_foreign: bool) -> None:
        """Somebody answers the approval that a run asked for last, or none."""
        seq = max(self._model.schema.approvals.get((self._tenant_id, append.run_id), {1: None}))
        answer = state_pb2.ApprovalInput(approval_id=f"{append.run_id}.{seq}", decision=ALLOW, data=b"1")
        self._ask(append, request_id, is_foreign=is_foreign, approval=answer)

    def _ask(self, append: state_pb2.Append, request_id: str, *, is_foreign: bool, **asked: Any) -> None:
        owner = self._log[append.run_id]
        user = next(user for user in self._users if (user is owner) != is_foreign)
        run_input = state_pb2.RunInput(**asked)
        answer = run_input.approval
        stored = self._model.schema.put_input(
            self._tenant_id, user.user_id, append.run_id, request_id, user.user_id, run_input.WhichOneof("input") or "",
            run_input.SerializeToString(), UNCONSUMED_MAX, int(answer.approval_id.partition(".")[2] or 0),
            answer.decision, answer.data, [], False,
        )  # fmt: skip
        unknown = "APPROVAL_NOT_FOUND" if run_input.HasField("approval") else "RUN_NOT_FOUND"
        expected = unknown if stored is None else REASONS[stored["reason"]]
        assert self.run(self._session.put_input(user, append.run_id, request_id, **asked)) == expected

    @rule(executor=st.sampled_from(EXECUTORS))
    def beat(self, executor: int) -> None:
        """An executor lives."""
        self.run(self._session.beat(self._session.executors[executor]))
        self._model.schema.beat(self._session.executors[executor].executor_id, "s", LEASE_SECONDS)

    @rule(executor=st.sampled_from(EXECUTORS))
    def lose(self, executor: int) -> None:
        """An executor is held for dead from now on, until it beats again."""
        self.run(self._session.beat(self._session.executors[executor], leaving=True))
        self._model.schema.shorten_lease(self._session.executors[executor].executor_id, "", 0.0)

    @rule(executor=st.sampled_from(EXECUTORS))
    def claim(self, executor: int) -> None:
        """A living executor claims what nobody drives; what too many died on is ended."""
        claimer = self._session.executors[executor]
        before = copy.deepcopy(self._model.schema)
        claimed = self._claim_in_model(claimer)
        if not claimed:
            # The process is not asked, as nobody could tell when it had found nothing. What a look changes, such as who
            # stands in line for a slot, did not change then.
            self._model.schema = before
            return
        with self.bench.loop.opened(lambda: self._session.claiming(claimer)) as claims:
            while claimed:
                handed = [run for run in claimed if run["stalled"] <= STALLED_MAX]
                runs = self.run(claims.take(len(handed)))
                assert {run.run_id: run.epoch for run in runs} == {run["run_id"]: run["epoch"] for run in handed}
                for run in claimed:
                    if run["stalled"] > STALLED_MAX:
                        self._poison(run)
                # The end of a run may have let the next one of its session begin.
                claimed = self._claim_in_model(claimer)

    def _claim_in_model(self, claimer: Executor) -> list[dict[str, Any]]:
        """What the model's database gives the executor."""
        return self._model.schema.claim(
            claimer.executor_id, CREDIT, EARLY, claimer.state_id, LEASE_SECONDS, STALLED_MAX, PAGE_MAX
        )

    @rule(
        append=appends,
        dead=st.sampled_from(EXECUTORS),
        times=st.sampled_from([1, 1, 1, STALLED_MAX, STALLED_MAX + 1]),
        kind=st.sampled_from(["recovered", "recovered", *KINDS]),
    )
    def take_over(self, append: state_pb2.Append, dead: int, times: int, kind: str) -> None:
        """All that an executor held goes to the other one, maybe to and fro; the last one goes on with one run."""
        for number in range(times):
            loser = (dead + number) % 2
            self.beat(1 - loser)
            self.lose(loser)
            self.claim(1 - loser)
        sender = self._session.executors[1 - loser]
        self._send(sender, [self._next(sender, append, [kind])])

    def _poison(self, run: dict[str, Any]) -> None:
        """Takes over into the model how the state process ended the run."""
        log = self.run(self._session.ended_log(run["run_id"]))
        events = log[run["last_seq"] :]
        append = state_pb2.Append(
            append_id=events[0].append_id,
            tenant_id=self._tenant_id,
            run_id=run["run_id"],
            expected_seq=run["last_seq"],
            epoch=run["epoch"],
            events=events,
        )
        assert [answer.reason for answer in self._model.append([append])] == [""]

    @rule(append=appends, part=st.floats(0, 1))
    def follow(self, append: state_pb2.Append, part: float) -> None:
        """A user follows a run from somewhere on, to see in the end that nothing was missed."""
        run = self._model.schema.runs.get((self._tenant_id, append.run_id))
        if run is not None:
            after_seq = int(part * run["last_seq"])
            self.run(self._session.follow(self._log[append.run_id], append.run_id, after_seq))

    def check_agreement(self) -> None:
        """The tables hold the same, and every watcher sees the rows, once and in order."""
        real = in_order(self.run(self._session.tables(self._tenant_id)))
        assert real == in_order(self._model.tables())
        for watcher, run_id, after_seq in self._session.watchers:
            last_seq = self._model.schema.runs[self._tenant_id, run_id]["last_seq"]
            if last_seq > after_seq:
                self.run(watcher.until_seq(last_seq))
            assert watcher.seqs() == list(range(after_seq + 1, last_seq + 1))

    def teardown(self) -> None:
        """Compares all there is and closes the streams."""
        try:
            self.check_agreement()
        finally:
            self._opened.__exit__(None, None, None)


async def test_runs_of_two_tenants_may_have_one_id(executor: Executor, contract_environment: dict[str, Any]) -> None:
    users = [person(), person()]
    run_id = executor.create(users[0]).run_id
    for user in users:
        create = executor.create(user)
        create.run_id = create.events[0].run_id = run_id
        assert reason_of((await executor.send_one(create)).status) == ""
    await executor.go_on(users[0], run_id, thinking(), after=1)
    keys = [(user.tenant_id, run_id) for user in users]
    async with await postgres.connect(contract_environment["database_url"]) as pool:
        leases = Leases(pool, "state", lease_seconds=1)
        assert await leases.last_seqs(keys) == dict(zip(keys, [2, 1], strict=True))
        assert await leases.last_seqs(keys[::-1]) == dict(zip(keys, [2, 1], strict=True))


def drive(bench: Bench, *, examples: int, steps: int) -> None:
    """Runs the machine for so many examples of so many steps each."""

    class Machine(StateMachine):
        pass

    Machine.bench = bench
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            # What fails, fails at once: to shrink a history takes minutes.
            phases=[Phase.generate],
            report_multiple_bugs=False,
        ),
    )


@pytest.fixture
def bench(grpc_server: Any, grpc_addr: str, identities: Identities, contract_environment: dict[str, Any]) -> Any:
    """The process under test, and a loop for its callers."""
    loop = LoopThread("state-machine")
    yield Bench(grpc_addr, identities, contract_environment["owner_database_url"], loop)
    loop.close()


def test_state_does_what_its_model_does(grpc_stub: Any, bench: Bench) -> None:
    drive(bench, examples=15, steps=25)


@pytest.mark.long
@pytest.mark.timeout(1_500)
def test_state_does_what_its_model_does_at_length(grpc_stub: Any, bench: Bench) -> None:
    drive(bench, examples=150, steps=50)
