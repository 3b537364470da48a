"""The model steps of one run: what a model is given, its attempts, and its answer's way into the log."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Final

import grpc
from mainspring.v1 import types_pb2
from mainspring_kit.errors import MainspringError
from mainspring_kit.identity import UserExecutionContext

from mainspring_execution.core.record import CORE_EXECUTION, error_value
from mainspring_execution.core.thought import Thought, Turn, record_thought
from mainspring_execution.engine.attention import Attention
from mainspring_execution.engine.catalog import PreparedAgent
from mainspring_execution.engine.ending import Ending
from mainspring_execution.engine.journal import Journal
from mainspring_execution.engine.surroundings import Grip, Surroundings

MODEL_ATTEMPTS_MAX: Final = 3
MODEL_RETRY_SECONDS: Final = 0.1
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
    ) -> None:
        self._around = surroundings
        self._context = context
        self._run = run
        self._attention = attention
        self._journal = journal
        self._grip = grip
        self._ending = ending
        self._history: Sequence[types_pb2.Run] | None = None

    async def take_step(self, agent: PreparedAgent, step: int) -> None:
        """Asks for one step and records the answer, or the run's end; neither when interrupted."""
        model = agent.model
        if model.needs_history and self._history is None:
            self._history = await self._grip.reach(self._list_history)
            if self._history is None:
                return
        if model.waits(step):
            self._journal.flush()
        if step % STEPS_AT_ONCE == 0:
            await asyncio.sleep(0)
        if self._journal.is_behind:
            await self._grip.wait_durable()
        if not await self._grip.hold_lease() or self._attention.is_interrupted:
            return
        self._ending.mark(CORE_EXECUTION)
        try:
            thought = await self._think(agent, step)
            if thought is not None:
                seq = self._journal.progress.seq + 1
                thinking = record_thought(thought, run_id=self._run.run_id, seq=seq, step=step)
                self._journal.record(agent_thinking=thinking)
        except MainspringError as error:
            await self._ending.failed(error_value(error))

    async def _think(self, agent: PreparedAgent, step: int) -> Thought | None:
        """Asks the model, again where it was unavailable; None when interrupted."""
        for attempt in range(1, MODEL_ATTEMPTS_MAX + 1):
            try:
                return await self._attention.listen(
                    agent.model.think(self._turn(agent, step, attempt=attempt), _keep_quiet)
                )
            except MainspringError as error:
                if error.code is not grpc.StatusCode.UNAVAILABLE or attempt == MODEL_ATTEMPTS_MAX:
                    raise
            await self._attention.pause(MODEL_RETRY_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
            if not await self._grip.hold_lease():
                break
        return None

    def _turn(self, agent: PreparedAgent, step: int, *, attempt: int) -> Turn:
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
            thoughts=progress.thoughts,
        )

    async def _list_history(self) -> list[types_pb2.Run]:
        return await self._around.state.list_history(
            self._context, before_ordinal=self._run.ordinal, runs_max=HISTORY_RUNS_MAX
        )


def _keep_quiet(_: str) -> None:
    """Until deltas are published."""
