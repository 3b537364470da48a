"""One run in this process's hands: does what core decides, step by step, until the run ends or is somebody else's."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Final, TypeVar

from mainspring.v1 import events_pb2, types_pb2
from mainspring_kit import telemetry
from mainspring_kit.errors import MainspringError
from mainspring_kit.identity import UserExecutionContext

from mainspring_execution.core.decision import (
    CallModel,
    CallTools,
    Close,
    Decision,
    Expire,
    Fail,
    Finish,
    HandOver,
    OpenWaits,
    Park,
    decide,
)
from mainspring_execution.core.plan import AgentPlan
from mainspring_execution.core.progress import Progress, fold
from mainspring_execution.core.record import error_value
from mainspring_execution.core.unknown import Ask, make_question
from mainspring_execution.engine.attention import Attention
from mainspring_execution.engine.calls import Calls
from mainspring_execution.engine.catalog import PreparedAgent
from mainspring_execution.engine.deadlines import Deadlines
from mainspring_execution.engine.ending import Ending, internal_fault
from mainspring_execution.engine.journal import Journal, ask
from mainspring_execution.engine.surroundings import Grip, Surroundings
from mainspring_execution.engine.thinking import Thinking
from mainspring_execution.engine.tree import Tree
from mainspring_execution.engine.waiting import Waiting

REACH_SECONDS: Final = 0.25
MENDS_MAX: Final = 3
FAULTS_MAX: Final = 3
REST_SECONDS: Final = 3.0

# What can only be said of an append's own value: the run ends without it.
VALUE_REFUSALS: Final = ("EVENT_REFUSED", "PAYLOAD_TOO_LARGE", "REQUEST_INVALID")

Answer = TypeVar("Answer")


class Drive:
    """Drives one run whose agent_started is in the journal, or begins it. Interrupts come through `attention`."""

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
        tree: Tree,
        grip: Grip,
        deadlines: Deadlines,
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
        self._tree = tree
        self._calls = calls
        self._grip = grip
        self._deadlines = deadlines
        self._thinking = Thinking(
            surroundings,
            context,
            run=run,
            attention=attention,
            journal=journal,
            grip=grip,
            ending=ending,
            deadlines=deadlines,
        )
        self._waiting = Waiting(
            surroundings, context, run=run, attention=attention, journal=journal, grip=grip, deadlines=deadlines
        )
        self._mends = 0

    @property
    def outcome(self) -> str:
        """What became of the run here, as the log line says."""
        if self.attention.is_abandoned:
            return "run_left"
        return "run_released" if self._journal.is_released else "run_ended"

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

    def resume(self, progress: Progress) -> None:
        """Takes how far the durable log has come; with its first event the run's own time begins."""
        self._journal.restore(progress)
        if self._journal.progress.waiting_since_ms:
            self._journal.progress.end_wait(time.time() * 1e3)
        started_ms = self._journal.progress.started_ms
        carried_seconds = max(0.0, time.time() - started_ms / 1e3) if started_ms else 0.0
        if self._journal.progress.started:
            self._ending.begin(carried_seconds=carried_seconds)

    def record_recovery(self, *, attempt: int, executor_id: str, handed_back: bool) -> None:
        """Records that this executor goes on; durable before anything else is done."""
        recovered = events_pb2.RunRecovered(
            attempt=max(attempt, 1),
            executor=executor_id,
            lost_calls=self._journal.progress.lost_calls(),
            handed_back=handed_back,
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
        await self._grip.wait_durable()
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
        if journal.progress.ended or journal.is_released:
            # Also where the log says so after a refused append: no cancel and no deadline can interrupt that any more.
            attention.is_ending = True
            await self._grip.wait_durable()
            return not journal.is_settled or attention.is_interrupted
        if attention.cancel_input is not None:
            await self._ending.cancelled(attention.cancel_input)
        elif attention.is_expired:
            await self._ending.timed_out(self._run)
        else:
            if attention.inputs and journal.progress.started:
                self._waiting.take_inputs()
            ended = self._waiting.ended_sub_runs
            if ended and not journal.progress.paused:
                if await self._tree.take_end(ended[0]):
                    del ended[0]
            elif self._waiting.pause_input is not None and not self._calls.under_way:
                self._waiting.pause()
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
        progress = self._journal.progress
        if progress.source_seq or progress.unmade:
            await (self._tree.copy_steps(agent.plan) if progress.source_seq else self._tree.make_sub_runs())
            return
        if progress.agent or agent.plan.agent != self._run.agent:
            agent = await self._recall(agent)
            if agent is None:
                return
        decision = decide(
            agent.plan,
            self._journal.progress,
            run_id=self._run.run_id,
            now=time.time(),
            under_way=self._calls.known(),
        )
        if isinstance(decision, CallTools | CallModel) and self.attention.is_leaving and not self._calls.under_way:
            self._waiting.hand_back()
        elif isinstance(decision, CallTools):
            await self._call_tools(agent.plan, decision)
        elif isinstance(decision, CallModel):
            await self._thinking.take_step(agent, decision.step)
        elif isinstance(decision, HandOver):
            await self._tree.hand_over(agent.plan, decision.call)
        elif isinstance(decision, Finish):
            await self._ending.completed(agent.plan, decision.result)
        elif isinstance(decision, Fail):
            await self._ending.failed(decision.error)
        else:
            await self._wait(agent.plan, decision)

    async def _recall(self, agent: PreparedAgent) -> PreparedAgent | None:
        """The agent that drives the run now; None: none yet, or none any more."""
        progress = self._journal.progress
        name, version = progress.agent or self._run.agent, progress.agent_version or self._run.agent_version
        if (agent.plan.agent, agent.plan.version) == (name, version):
            return agent
        recalled = await self._tree.recall(name, version)
        if isinstance(recalled, MainspringError):
            self._agent, self._unfit = None, recalled
            return None
        if recalled is not None:
            self._agent = recalled
        return recalled

    async def _wait(self, plan: AgentPlan, decision: Decision) -> None:
        """Does what core decides for a run that waits, or has yet to begin."""
        if isinstance(decision, OpenWaits):
            self._waiting.open(plan, decision.calls)
        elif isinstance(decision, Close):
            self._journal.record(tool_completed=decision.outcome)
        elif isinstance(decision, Park):
            await self._waiting.park(decision)
        elif isinstance(decision, Expire):
            await self._waiting.expire(decision.approval_id)
        elif isinstance(decision, Ask):
            ask(self._journal, make_question(decision.intent))
        else:
            await self._begin()

    async def _begin(self) -> None:
        """Begins a claimed run. The claim may be old: only that the first event is taken says that it still holds."""
        run = self._run
        started = events_pb2.AgentStarted(
            agent_version=run.agent_version,
            input=run.input,
            ordinal=run.ordinal,
            attempt=max(run.attempt, 1),
            source_run_id=run.source_run_id,
            source_seq=run.source_seq,
        )
        self._journal.record(agent_started=started)
        self._journal.flush()
        self._ending.begin()
        await self._grip.wait_durable()

    async def _refuse_to_run(self) -> None:
        """Fails a run that cannot go on whatever its log says."""
        assert self._unfit is not None, "a drive has an agent or a reason for having none"
        await self._ending.failed(error_value(self._unfit))

    async def _call_tools(self, plan: AgentPlan, decision: CallTools) -> None:
        """Makes calls of a step, all at once, and records each outcome when it comes."""
        planned = decision.calls
        intents = self._journal.progress.intents
        new_tools = [call.tool for call in planned if call.call_id not in intents]
        if self._around.catalog.lacks(new_tools, tenant_id=self._context.tenant_id) and not await self._grip.reach(
            self._learn_tools
        ):
            return
        must_be_durable = self._calls.intend(plan, planned)
        if not await self._grip.hold_lease():
            return
        self._journal.flush()
        if must_be_durable:
            await self._grip.wait_durable()
        self._deadlines.begin_step(plan, self._journal.progress.steps)
        while await self._grip.hold_lease() and not self.attention.is_interrupted:
            next_seconds = min(self._calls.post(plan, planned), decision.until - time.time())
            under_way = self._calls.under_way
            if not under_way or next_seconds <= 0 or self.attention.inputs:
                return
            await self.attention.pause(next_seconds, under_way.values())
            if self.attention.is_interrupted:
                return
            self._calls.take_outcomes(plan)
            if under_way:
                # What others wait beside is told at once; the last outcome goes with the next model step.
                self._journal.flush()

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
        run = await self._grip.reach(self._grip.get_run, only_abandoned=True)
        log = await self._grip.reach(self._read_log, only_abandoned=True) if run is not None else None
        if run is None or log is None or run.epoch != self._journal.epoch:
            self.attention.abandon()
            return False
        self._journal.restore(fold(log))
        # Only now: each append behind the refused one has alarmed as well.
        self.attention.is_troubled = self.attention.is_ending = False
        self.attention.hear_again()
        return True

    async def _read_log(self) -> list[events_pb2.RunEvent]:
        return await self._around.state.read_events(self._context, self._run.run_id)

    async def _learn_tools(self) -> bool:
        return await self._around.catalog.learn_tools(self._context)
