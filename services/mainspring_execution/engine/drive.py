"""One run in this process's hands: does what core decides, step by step, until the run ends or is somebody else's."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import grpc
from mainspring.v1 import events_pb2, types_pb2
from mainspring_kit import telemetry
from mainspring_kit.errors import MainspringError
from mainspring_kit.identity import UserExecutionContext
from mainspring_kit.tasks import raise_if_cancelled

from mainspring_execution.core.decision import (
    CallModel,
    CallTools,
    Fail,
    Finish,
    decide,
)
from mainspring_execution.core.plan import AgentPlan
from mainspring_execution.core.progress import fold
from mainspring_execution.core.record import CORE_EXECUTION, error_value
from mainspring_execution.core.thought import Thought, Turn, record_thought
from mainspring_execution.engine.attention import Attention
from mainspring_execution.engine.calls import Calls
from mainspring_execution.engine.catalog import Catalog, PreparedAgent
from mainspring_execution.engine.ending import Ending, internal_fault
from mainspring_execution.engine.journal import Journal
from mainspring_execution.engine.lease import Lease
from mainspring_execution.models import Model
from mainspring_execution.peers import UNREACHED, Dispatcher, State

MODEL_ATTEMPTS_MAX: Final = 3
MODEL_RETRY_SECONDS: Final = 0.1
REACH_SECONDS: Final = 0.25
MENDS_MAX: Final = 3
FAULTS_MAX: Final = 3
REST_SECONDS: Final = 3.0
HISTORY_RUNS_MAX: Final = 100
# Model steps that may follow each other without a wait; then all others have their turn.
STEPS_AT_ONCE: Final = 4

# What can only be said of an append's own value: the run ends without it.
VALUE_REFUSALS: Final = ("EVENT_REFUSED", "PAYLOAD_TOO_LARGE", "REQUEST_INVALID")

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all runs of the process share."""

    state: State
    dispatcher: Dispatcher
    catalog: Catalog
    lease: Lease


class Drive:
    """Drives one run whose agent_started is in the journal, or begins it. Interrupts come through `attention`.

    `lapses`: of the lease, when it was last known that the run is this process's.
    """

    def __init__(
        self,
        surroundings: Surroundings,
        context: UserExecutionContext,
        *,
        agent: PreparedAgent | MainspringError,
        run: types_pb2.Run,
        attention: Attention,
        journal: Journal,
        calls: Calls,
        ending: Ending,
        lapses: int,
    ) -> None:
        self.attention = attention
        self.run_id = run.run_id
        self.epoch = run.epoch
        self._around = surroundings
        self._context = context
        self._agent = agent if isinstance(agent, PreparedAgent) else None
        self._unfit = agent if isinstance(agent, MainspringError) else None
        self._run = run
        self._journal = journal
        self._ending = ending
        self._calls = calls
        self._history: Sequence[types_pb2.Run] | None = None
        self._lapses = lapses
        self._mends = 0

    def summary(self) -> dict[str, object]:
        """What the log line of the run's end says."""
        progress = self._journal.progress
        return {
            "run_id": self.run_id,
            "agent": self._run.agent,
            "last_event": progress.last_event,
            "seq": progress.seq,
            "steps": progress.steps,
            "calls": len(progress.planned),
            "recoveries": progress.recoveries,
        }

    def resume(self, log: Iterable[events_pb2.RunEvent]) -> None:
        """Takes the run's durable events, if there are any yet; with the first one the run's own time begins."""
        self._journal.restore(fold(log))
        started_ms = self._journal.progress.started_ms
        carried_seconds = max(0.0, time.time() - started_ms / 1e3) if started_ms else 0.0
        if self._journal.progress.started:
            self._ending.begin(carried_seconds=carried_seconds)

    def record_recovery(self, *, attempt: int, executor_id: str) -> None:
        """Records that this executor goes on; durable before anything else is done."""
        recovered = events_pb2.RunRecovered(
            attempt=max(attempt, 1), executor=executor_id, lost_calls=self._journal.progress.lost_calls()
        )
        self._journal.record(run_recovered=recovered)
        self._journal.flush()

    async def run(self) -> None:
        """Goes on until the run has ended durably, or is no longer this process's."""
        timer = None
        if self._run.HasField("deadline"):
            left_seconds = self._run.deadline.ToNanoseconds() / 1e9 - time.time()
            timer = asyncio.get_running_loop().call_later(max(0.0, left_seconds), self.attention.expire)
        try:
            await self._drive()
        finally:
            if timer is not None:
                timer.cancel()
            self._calls.forget()

    async def _drive(self) -> None:
        """Advances to the end. What goes wrong in between ends the run; if that goes wrong too, it is tried again."""
        await self._wait_durable()
        failure: types_pb2.RunError | None = None
        faults = 0
        while True:
            try:
                if faults >= FAULTS_MAX:
                    faults = 0
                    if not await self._start_over():
                        return
                if failure is not None and not self._journal.progress.ended:
                    await self._ending.failed(failure)
                while await self._advance():
                    pass
                return
            except MainspringError as error:
                failure = error_value(error)
            except Exception as fault:  # a fault of ours in one run must not end the others
                telemetry.logger().error("run_faulted", run_id=self._run.run_id, exc_info=fault)
                failure = error_value(internal_fault(self._run.run_id))
            faults += 1

    async def _advance(self) -> bool:
        """Does one thing; False when there is nothing more to do here."""
        attention, journal = self.attention, self._journal
        if attention.is_abandoned:
            return False
        if attention.is_troubled:
            return await self._mend()
        if journal.progress.ended:
            # Also where the log says so after a refused append: no cancel and no deadline can interrupt that any more.
            attention.is_ending = True
            await self._wait_durable()
            return not journal.is_settled or attention.is_interrupted
        if attention.cancel_input is not None:
            await self._ending.cancelled(attention.cancel_input)
        elif attention.is_expired:
            await self._ending.timed_out(self._run)
        else:
            await self._follow()
        return True

    async def _follow(self) -> None:
        """Does what core decides."""
        agent = self._agent
        if self._run.state == types_pb2.RUN_STATE_QUEUED:
            # Claimed before its turn, to be ended: by its deadline, if nobody asks for it before.
            await self.attention.wait()
            return
        if agent is None:
            await self._refuse_to_run()
            return
        decision = decide(agent.plan, self._journal.progress, run_id=self._run.run_id, under_way=self._calls.under_way)
        if isinstance(decision, CallTools):
            await self._call_tools(agent.plan, decision.calls)
        elif isinstance(decision, CallModel):
            await self._call_model(agent.model, decision.step)
        elif isinstance(decision, Finish):
            await self._ending.completed(agent.plan, decision.result)
        elif isinstance(decision, Fail):
            await self._ending.failed(decision.error)
        else:
            await self._begin()

    async def _begin(self) -> None:
        """Begins a claimed run. The claim may be old: only that the first event is taken says that it still holds."""
        run = self._run
        started = events_pb2.AgentStarted(
            agent_version=run.agent_version, input=run.input, ordinal=run.ordinal, attempt=1
        )
        self._journal.record(agent_started=started)
        self._journal.flush()
        self._ending.begin()
        await self._wait_durable()

    async def _refuse_to_run(self) -> None:
        """Fails a run that cannot go on whatever its log says."""
        assert self._unfit is not None, "a drive has an agent or a reason for having none"
        await self._ending.failed(error_value(self._unfit))

    async def _call_model(self, model: Model, step: int) -> None:
        if model.needs_history and self._history is None:
            self._history = await self._reach(self._list_history)
            if self._history is None:
                return
        if model.waits(step):
            self._journal.flush()
        if step % STEPS_AT_ONCE == 0:
            await asyncio.sleep(0)
        if self._journal.is_behind:
            await self._wait_durable()
        if not await self._hold_lease() or self.attention.is_interrupted:
            return
        self._ending.mark(CORE_EXECUTION)
        try:
            thought = await self._think(model, step)
            if thought is not None:
                seq = self._journal.progress.seq + 1
                thinking = record_thought(thought, run_id=self._run.run_id, seq=seq, step=step)
                self._journal.record(agent_thinking=thinking)
        except MainspringError as error:
            await self._ending.failed(error_value(error))

    async def _think(self, model: Model, step: int) -> Thought | None:
        """Asks the model, again where it was unavailable; None when interrupted."""
        for attempt in range(1, MODEL_ATTEMPTS_MAX + 1):
            try:
                return await self.attention.listen(model.think(self._turn(step, attempt)))
            except MainspringError as error:
                if error.code is not grpc.StatusCode.UNAVAILABLE or attempt == MODEL_ATTEMPTS_MAX:
                    raise
            await self.attention.pause(MODEL_RETRY_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
            if not await self._hold_lease():
                break
        return None

    def _turn(self, step: int, attempt: int) -> Turn:
        progress = self._journal.progress
        return Turn(
            tenant_id=self._context.tenant_id,
            user_id=self._context.user_id,
            session_id=self._context.session_id,
            run_id=self._run.run_id,
            step=step,
            attempt=attempt,
            input=progress.input,
            planned=progress.planned,
            outcomes=progress.outcomes,
            history=self._history or (),
        )

    async def _call_tools(self, plan: AgentPlan, planned: Sequence[events_pb2.PlannedCall]) -> None:
        """Makes the calls of a step, all at once, and records each outcome when it comes."""
        intents = self._journal.progress.intents
        new_tools = [call.tool for call in planned if call.call_id not in intents]
        if self._around.catalog.lacks(new_tools, tenant_id=self._context.tenant_id) and not await self._reach(
            self._learn_tools
        ):
            return
        must_be_durable = self._calls.intend(plan, planned)
        if not await self._hold_lease():
            return
        self._journal.flush()
        if must_be_durable:
            await self._wait_durable()
        if self.attention.is_interrupted or not await self._hold_lease():
            return
        self._calls.post(planned)
        while self._calls.under_way:
            await self.attention.wait(self._calls.under_way.values())
            if self.attention.is_interrupted:
                return
            self._calls.take_outcomes()
            if self._calls.under_way:
                # What others wait beside is told at once; the last outcome goes with the next model step.
                self._journal.flush()

    async def _wait_durable(self) -> None:
        """Until every append is durable, or an interrupt."""
        self.attention.is_awaiting_answers = True
        while not self._journal.is_settled and not self.attention.is_interrupted:
            await self.attention.wait()
        self.attention.is_awaiting_answers = False

    async def _hold_lease(self) -> bool:
        """Whether an effect may start now; waits for the lease where it lapsed. False: look at the interrupts."""
        lease = self._around.lease
        while not lease.is_held or lease.lapses != self._lapses:
            if self.attention.is_interrupted:
                return False
            lapses = lease.lapses
            if not lease.is_held:
                await self.attention.listen(lease.wait_held())
            elif await self._is_still_held():
                self._lapses = lapses
            else:
                return False
        return True

    async def _is_still_held(self) -> bool:
        """After a lapse another executor may hold the run: an append that is taken says no, else state is asked."""
        if self._journal.flush():
            await self._wait_durable()
            return not self.attention.is_interrupted
        run = await self._reach(self._get_run)
        if run is None:
            return False
        if run.epoch != self._journal.epoch:
            self.attention.abandon()
            return False
        return True

    async def _mend(self) -> bool:
        """After a refused append: goes on from what is durable, if the run is still this process's."""
        trouble = self._journal.trouble
        assert trouble is not None, "an alarm without a refused append"
        self._mends += 1
        telemetry.logger().warning(
            "append_refused", run_id=self._run.run_id, reason=trouble.reason_name, mends=self._mends
        )
        if not await self._restore():
            return False
        if self._mends > MENDS_MAX:
            raise trouble
        if trouble.reason_name in VALUE_REFUSALS:
            await self._ending.refused(trouble, attempt=self._mends)
        return True

    async def _start_over(self) -> bool:
        """After a rest goes on from what is durable: while this process lives nobody else would take the run up."""
        telemetry.logger().error("run_set_aside", run_id=self._run.run_id, seconds=REST_SECONDS)
        await asyncio.sleep(REST_SECONDS * random.uniform(0.5, 1.0))
        self._mends = 0
        return await self._restore()

    async def _restore(self) -> bool:
        """Takes what is durable for what has happened; False: the run is no longer this process's."""
        await self._journal.wait_answered()
        run = await self._reach(self._get_run, only_abandoned=True)
        log = await self._reach(self._read_log, only_abandoned=True) if run is not None else None
        if run is None or log is None or run.epoch != self._journal.epoch:
            self.attention.abandon()
            return False
        self._journal.restore(fold(log))
        # Only now: each append behind the refused one has alarmed as well.
        self.attention.is_troubled = self.attention.is_ending = False
        return True

    async def _get_run(self) -> types_pb2.Run:
        return await self._around.state.get_run(self._context, self._run.run_id)

    async def _read_log(self) -> list[events_pb2.RunEvent]:
        return await self._around.state.read_events(self._context, self._run.run_id)

    async def _list_history(self) -> list[types_pb2.Run]:
        return await self._around.state.list_history(
            self._context, before_ordinal=self._run.ordinal, runs_max=HISTORY_RUNS_MAX
        )

    async def _learn_tools(self) -> bool:
        return await self._around.catalog.learn_tools(self._context)

    async def _reach(self, ask: Callable[[], Awaitable[Answer]], *, only_abandoned: bool = False) -> Answer | None:
        """Asks a peer until it answers; None when interrupted, or when the run is no more."""
        while True:
            try:
                return await ask()
            except MainspringError as error:
                if error.code is grpc.StatusCode.NOT_FOUND:
                    self.attention.abandon()
                elif error.code not in UNREACHED:
                    raise
            raise_if_cancelled()
            if self.attention.is_abandoned or (self.attention.is_interrupted and not only_abandoned):
                return None
            await asyncio.sleep(REACH_SECONDS * random.uniform(0.5, 1.0))
