"""Other agents and other runs in one run: makes and ends sub-runs, hands the run over, begins a fork."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeVar

from mainspring.v1 import events_pb2, state_pb2, types_pb2
from mainspring_kit.errors import MainspringError
from mainspring_kit.identity import UserExecutionContext, new_id

from mainspring_execution.core.decision import refuse_call
from mainspring_execution.core.forks import finished_steps, planned_ids, repeat
from mainspring_execution.core.intrinsic import AGENT_PREFIX
from mainspring_execution.core.plan import AgentPlan
from mainspring_execution.core.sub_runs import (
    hand_over,
    handoff_agent,
    make_sub_run,
    refuse_sub_run,
    settle_sub_run,
)
from mainspring_execution.core.waits import make_intent
from mainspring_execution.engine.attention import Attention
from mainspring_execution.engine.catalog import PreparedAgent
from mainspring_execution.engine.journal import Journal
from mainspring_execution.engine.surroundings import Grip, Surroundings
from mainspring_execution.peers import UNREACHED

RETRY_SECONDS: Final = 0.25

Answer = TypeVar("Answer")


class Launcher(Protocol):
    """Makes runs and has them driven."""

    async def launch(
        self,
        append: state_pb2.Append,
        context: UserExecutionContext,
        *,
        agent: PreparedAgent,
        run: types_pb2.Run,
        state_id: str,
    ) -> MainspringError | None:
        """Makes a sub-run durable and drives it beside the caller; why not, if it was refused."""
        ...


class Tree:
    """The relations of one run to others."""

    def __init__(
        self,
        surroundings: Surroundings,
        context: UserExecutionContext,
        *,
        launcher: Launcher,
        run: types_pb2.Run,
        attention: Attention,
        journal: Journal,
        grip: Grip,
    ) -> None:
        self._around = surroundings
        self._context = context
        self._launcher = launcher
        self._run = run
        self._attention = attention
        self._journal = journal
        self._grip = grip

    async def make_sub_runs(self) -> None:
        """Makes the sub-runs that the log names and of which nobody here knows that they are there.

        One that somebody else has made is driven by whoever that was, or is claimed.
        """
        self._journal.flush()
        await self._grip.wait_durable()
        for call_id in list(self._journal.progress.unmade):
            if not await self._grip.hold_lease() or self._attention.is_interrupted:
                return
            intent = self._journal.progress.intents[call_id]
            agent = await self._resolve(intent.tool.removeprefix(AGENT_PREFIX))
            if agent is None:
                return
            refusal = agent if isinstance(agent, MainspringError) else await self._make(intent, agent)
            if refusal is not None:
                outcome = refuse_sub_run(self._journal.progress, intent, error=refusal, now=time.time())
                self._journal.record(tool_completed=outcome)
            self._journal.progress.unmade.pop(call_id, None)

    async def take_end(self, request: state_pb2.RunInput) -> bool:
        """Records how a sub-run has ended; False when interrupted."""
        ended, progress = request.sub_run_ended, self._journal.progress
        intent = progress.intents.get(ended.call_id)
        if intent is not None and ended.call_id not in progress.outcomes and intent.sub_run_id == ended.sub_run_id:
            run = await self._ask(lambda: self._around.state.get_run(self._context, ended.sub_run_id))
            if run is None:
                return False
            if isinstance(run, MainspringError):
                raise run
            self._journal.record(tool_completed=settle_sub_run(progress, intent, run=run, now=time.time()))
        self._journal.consume(request.request_id)
        return True

    async def cancel_sub_runs(self) -> None:
        """Asks for the end of the sub-runs that have not ended: durably, before this run ends itself."""
        for sub_run_id in self._journal.progress.sub_runs():
            request = state_pb2.PutInputRequest(
                run_id=sub_run_id,
                request_id=f"{self._run.run_id}.cancel",
                cancel=state_pb2.CancelInput(reason=f"Its parent run {self._run.run_id} ends."),
            )
            while not self._attention.is_abandoned:
                try:
                    await self._around.state.put_input(self._context, request)
                except MainspringError as error:
                    if error.code in UNREACHED:
                        await asyncio.sleep(RETRY_SECONDS * random.uniform(0.5, 1.0))
                        continue
                break

    async def hand_over(self, plan: AgentPlan, call: events_pb2.PlannedCall) -> None:
        """Lets another agent go on, or records why not. That it goes on is in the log as a whole or not at all."""
        agent = refuse_call(plan, call) or await self._resolve(handoff_agent(call))
        if agent is None:
            return
        intent = make_intent(call)
        if isinstance(agent, PreparedAgent):
            try:
                outcome, handed_off = hand_over(call, from_agent=plan.agent, to=agent.plan)
            except MainspringError as error:
                agent = error
            else:
                self._journal.flush()
                self._journal.record(tool_executing=intent)
                self._journal.record(tool_completed=outcome)
                self._journal.record(agent_handed_off=handed_off)
                return
        self._journal.record(tool_executing=intent)
        outcome = refuse_sub_run(self._journal.progress, intent, error=agent, now=time.time())
        self._journal.record(tool_completed=outcome)

    async def recall(self, agent: str, version: str) -> PreparedAgent | MainspringError | None:
        """The version of an agent that the run was handed over to; None when interrupted."""
        return await self._ask(lambda: self._around.catalog.recall(self._context, agent, version=version))

    async def copy_steps(self, plan: AgentPlan) -> None:
        """Takes the finished steps of the source over, from where an earlier executor came to."""
        progress, journal = self._journal.progress, self._journal
        log = await self._ask(lambda: self._around.state.read_events(self._context, progress.source_run_id))
        if log is None:
            return
        if isinstance(log, MainspringError):
            raise log
        steps = finished_steps(log, up_to_seq=progress.source_seq, fail_fast=plan.fail_fast)
        source_ids = planned_ids(steps)
        for event in steps:
            if event.seq <= progress.copied_seq:
                continue
            if journal.is_behind:
                await self._grip.wait_durable()
            if self._attention.is_interrupted:
                return
            call_ids = dict(zip(source_ids, (call.call_id for call in progress.planned), strict=False))
            journal.record(**repeat(event, run_id=self._run.run_id, seq=progress.seq + 1, call_ids=call_ids))
        journal.flush()
        progress.source_seq = 0

    async def _make(self, intent: events_pb2.ToolExecuting, agent: PreparedAgent) -> MainspringError | None:
        create, started, run = make_sub_run(
            self._run,
            intent,
            plan=agent.plan,
            session_id=self._context.session_id,
            user_id=self._context.user_id,
            trace_id=self._context.trace_id,
            executor_id=self._around.lease.executor_id,
            now=time.time(),
        )
        append = state_pb2.Append(
            append_id=new_id(),
            tenant_id=self._context.tenant_id,
            run_id=run.run_id,
            epoch=1,
            events=[started],
            create=create,
        )
        refusal = await self._launcher.launch(
            append, self._context, agent=agent, run=run, state_id=self._journal.state_id
        )
        # Made by an earlier executor, or by this one before an answer was lost.
        return None if refusal is None or refusal.reason_name in ("RUN_EXISTS", "APPEND_STALE") else refusal

    async def _resolve(self, agent: str) -> PreparedAgent | MainspringError | None:
        return await self._ask(lambda: self._around.catalog.resolve(self._context, agent))

    async def _ask(self, ask: Callable[[], Awaitable[Answer]]) -> Answer | MainspringError | None:
        """Asks a peer until it answers, an error being an answer too; None when interrupted."""

        async def told() -> Answer | MainspringError:
            try:
                return await ask()
            except MainspringError as error:
                if error.code in UNREACHED:
                    raise
                return error

        return await self._grip.reach(told)
