"""The model steps of one run: what a model is given, its attempts, and its answer's way into the log."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Final

from mainspring.v1 import types_pb2
from mainspring_kit.errors import MainspringError
from mainspring_kit.identity import UserExecutionContext

from mainspring_execution.core.attempts import choose_fallback, decide_next_attempt
from mainspring_execution.core.intrinsic import is_intrinsic
from mainspring_execution.core.plan import AgentPlan
from mainspring_execution.core.policy import Failure
from mainspring_execution.core.record import CORE_EXECUTION, error_value, make_failure
from mainspring_execution.core.thought import FAULTY_CHARACTERS_MAX, Thought, Turn, record_thought
from mainspring_execution.engine.attention import Attention
from mainspring_execution.engine.catalog import PreparedAgent
from mainspring_execution.engine.checking import check
from mainspring_execution.engine.deadlines import Deadlines, step_timed_out
from mainspring_execution.engine.ending import Ending
from mainspring_execution.engine.journal import Journal
from mainspring_execution.engine.surroundings import Grip, Surroundings

HISTORY_RUNS_MAX: Final = 100
# Model steps that may follow each other without a wait; then all others have their turn.
STEPS_AT_ONCE: Final = 4


class Thinking:
    """Asks the model of one run."""

    def __init__(
        self,
        surroundings: Surroundings,
        context: UserExecutionContext,
        *,
        run: types_pb2.Run,
        attention: Attention,
        journal: Journal,
        grip: Grip,
        ending: Ending,
        deadlines: Deadlines,
    ) -> None:
        self._around = surroundings
        self._context = context
        self._run = run
        self._attention = attention
        self._journal = journal
        self._grip = grip
        self._ending = ending
        self._deadlines = deadlines
        self._history: Sequence[types_pb2.Run] | None = None

    async def take_step(self, agent: PreparedAgent, step: int) -> None:
        """Asks for one step and records the answer, or the run's end; neither when interrupted."""
        model = agent.model
        if model.needs_history and self._history is None:
            self._history = await self._grip.reach(self._list_history)
            if self._history is None:
                return
        if model.needs_tools and not await self._know_tools(agent.plan):
            return
        if model.waits(step - self._journal.progress.agent_first_step + 1):
            self._journal.flush()
        if step % STEPS_AT_ONCE == 0:
            await asyncio.sleep(0)
        if self._journal.is_behind:
            await self._grip.wait_durable()
        if not await self._grip.hold_lease() or self._attention.is_interrupted:
            return
        self._ending.mark(CORE_EXECUTION)
        self._deadlines.begin_step(agent.plan, step)
        try:
            thought = await self._think(agent, step)
            if thought is not None:
                seq = self._journal.progress.seq + 1
                thinking = record_thought(thought, run_id=self._run.run_id, seq=seq, step=step)
                self._journal.record(agent_thinking=thinking)
        except MainspringError as error:
            await self._ending.failed(error_value(error))

    async def _think(self, agent: PreparedAgent, step: int) -> Thought | None:
        """Makes one attempt; None when it was interrupted, or failed and there is another one when its time comes."""
        usage: types_pb2.Usage | None = None
        try:
            thought = await self._attempt(agent, step)
            if thought is None or not agent.model.repairs:
                return thought
            usage = thought.usage
            fault = thought.fault or await self._check(agent.plan, thought)
            if fault is None:
                return thought
            raise fault
        except MainspringError as error:
            if not self._is_tried_again(agent, step, error=error_value(error), usage=usage):
                if usage is not None:
                    self._journal.progress.use(usage)
                raise
        return None

    async def _check(self, plan: AgentPlan, thought: Thought) -> MainspringError | None:
        """What is wrong with a result, beside which its model will see it."""
        fault = await check(plan, thought.result) if thought.result else None
        if fault is not None:
            fault.metadata["answer"] = thought.text[:FAULTY_CHARACTERS_MAX]
        return fault

    async def _attempt(self, agent: PreparedAgent, step: int) -> Thought | None:
        """One attempt, within the step's time and the model's own; None when interrupted."""
        thinking = self._attention.listen(agent.model.think(self._turn(agent, step), self._writer(step)))
        seconds = self._deadlines.bound_model(agent.plan)
        if seconds == math.inf:
            return await thinking
        try:
            async with asyncio.timeout(seconds) as limit:
                return await thinking
        except TimeoutError:
            if not limit.expired():
                raise
        raise step_timed_out(agent.plan, self._deadlines, step=step)

    def _is_tried_again(
        self, agent: PreparedAgent, step: int, *, error: types_pb2.RunError, usage: types_pb2.Usage | None
    ) -> bool:
        """Whether there is another attempt; if so, the failed one is in the log before it is waited for the next."""
        progress, plan, model = self._journal.progress, agent.plan, agent.model
        retry_time = decide_next_attempt(
            plan,
            progress.failures,
            error=error,
            fallbacks=model.fallbacks - self._first_asked(agent),
            repairs=model.repairs,
            retries_left=plan.retries_max - progress.retries,
            chance=random.random(),
            now=time.time(),
            deadline=self._deadlines.nearest,
        )
        if retry_time is None:
            return False
        failure = Failure(error, attempt=len(progress.failures) + 1)
        failed = make_failure(failure, retry_time=retry_time, step=step, usage=usage)
        self._journal.record(attempt_failed=failed, safe_to_skip=True)
        self._journal.flush()
        return True

    def _first_asked(self, agent: PreparedAgent) -> int:
        """The fallback that answered the step before: what could not answer that one is not asked again at once."""
        thoughts = self._journal.progress.thoughts
        return agent.model.rank(thoughts[-1].model) if agent.model.fallbacks and thoughts else 0

    def _writer(self, step: int) -> Callable[[str], None]:
        """Takes the text of one attempt; costs nothing until there is some."""
        write: Callable[[str], None] | None = None

        def emit(text: str) -> None:
            nonlocal write
            write = write or self._around.deltas.writer(
                self._context, self._run.run_id, step=step, state_id=self._journal.state_id
            )
            write(text)

        return emit

    def _turn(self, agent: PreparedAgent, step: int) -> Turn:
        progress, fallback = self._journal.progress, 0
        if agent.model.fallbacks:
            first = self._first_asked(agent)
            left = agent.model.fallbacks - first
            fallback = first + choose_fallback(agent.plan, progress.failures, fallbacks=left)[0]
        tools: Sequence[types_pb2.Tool] = ()
        if agent.model.needs_tools:
            tools = self._around.catalog.offer(agent.plan.tools, tenant_id=self._context.tenant_id)
        return Turn(
            tenant_id=self._context.tenant_id,
            user_id=self._context.user_id,
            session_id=self._context.session_id,
            run_id=self._run.run_id,
            step=step,
            attempt=len(progress.failures) + 1,
            input=progress.input,
            planned=progress.planned,
            outcomes=progress.outcomes,
            history=self._history or (),
            thoughts=progress.thoughts,
            failures=progress.failures,
            tools=tools,
            first_step=progress.agent_first_step,
            fallback=fallback,
        )

    async def _know_tools(self, plan: AgentPlan) -> bool:
        """Asks for tools that the catalog's copy lacks; False when interrupted."""
        tools = [tool for tool in plan.tools if not is_intrinsic(tool)]
        if not self._around.catalog.lacks(tools, tenant_id=self._context.tenant_id):
            return True
        return await self._grip.reach(self._learn_tools) or False

    async def _learn_tools(self) -> bool:
        return await self._around.catalog.learn_tools(self._context)

    async def _list_history(self) -> list[types_pb2.Run]:
        if self._run.ordinal <= 1:
            return []
        return await self._around.state.list_history(
            self._context, before_ordinal=self._run.ordinal, runs_max=HISTORY_RUNS_MAX
        )
