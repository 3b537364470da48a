"""The tool calls of one run: intents before effects, calls under way, outcomes, and the word to stop."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Container, Sequence
from typing import Final

from mainspring.v1 import dispatcher_pb2, events_pb2, types_pb2
from mainspring_kit.errors import MainspringError, Reason
from mainspring_kit.identity import DEPTH_MAX, UserExecutionContext, new_id

from mainspring_execution.core.decision import needs_durable_intent, refuse_call
from mainspring_execution.core.plan import AgentPlan
from mainspring_execution.core.policy import PAUSE_SECONDS_MAX, Failure, decide_retry
from mainspring_execution.core.record import error_value, make_failure, make_outcome, to_ms
from mainspring_execution.core.unknown import make_question
from mainspring_execution.engine.catalog import Catalog
from mainspring_execution.engine.deadlines import Deadlines
from mainspring_execution.engine.journal import Journal, ask
from mainspring_execution.peers import Dispatcher

_FAILED: Final = (types_pb2.TOOL_STATUS_ERROR, types_pb2.TOOL_STATUS_TIMED_OUT)

ToolFuture = asyncio.Future[dispatcher_pb2.ToolResult]


class Calls:
    """Makes the calls of one run. `under_way`: those sent and not yet recorded, by call_id."""

    def __init__(
        self,
        journal: Journal,
        context: UserExecutionContext,
        *,
        dispatcher: Dispatcher,
        catalog: Catalog,
        deadlines: Deadlines,
    ) -> None:
        self.under_way: dict[str, ToolFuture] = {}
        self._journal = journal
        self._tenant_id = context.tenant_id
        # What all calls' contexts have in common: children of the run's.
        self._child = context.to_message()
        self._child.parent_request_id = context.request_id
        self._child.depth = min(context.depth + 1, DEPTH_MAX)
        self._dispatcher = dispatcher
        self._catalog = catalog
        self._deadlines = deadlines
        self._post_times: dict[str, float] = {}
        # Calls that have failed here and are not made again yet.
        self._failed: set[str] = set()

    def known(self) -> Container[str]:
        """The calls of which this process knows whether somebody makes them: no other could have begun them."""
        return self.under_way.keys() | self._failed if self._failed else self.under_way

    def intend(self, plan: AgentPlan, planned: Sequence[events_pb2.PlannedCall]) -> bool:
        """Records the intents that the log lacks, and the failure of calls that the agent may not make.

        Answers whether the intents must be durable before the calls are made.
        """
        must_be_durable = False
        for call in planned:
            effect = self._intend(call)
            refusal = refuse_call(plan, call)
            if refusal is None:
                must_be_durable |= needs_durable_intent(effect)
                continue
            outcome = events_pb2.ToolCompleted(
                call_id=call.call_id, tool=call.tool, status=types_pb2.TOOL_STATUS_ERROR, error=error_value(refusal)
            )
            self._journal.record(tool_completed=outcome)
        return must_be_durable

    def post(self, plan: AgentPlan, planned: Sequence[events_pb2.PlannedCall]) -> float:
        """Sends the calls that have no outcome, are not under way, await no answer of a person's, and are due.

        Answers in how many seconds the next one of the others is due; infinite: none is.
        """
        now, next_seconds = time.perf_counter(), math.inf
        progress = self._journal.progress
        for call in planned:
            if (
                call.call_id in progress.outcomes
                or call.call_id in self.under_way
                or call.call_id in progress.approvals
            ):
                continue
            seconds = progress.retry_times.get(call.call_id, 0.0) - time.time() if progress.retry_times else 0.0
            if seconds > 0:
                next_seconds = min(next_seconds, seconds)
                continue
            self._child.request_id = new_id()
            tool = self._catalog.tool(call.tool, tenant_id=self._tenant_id)
            asked = dispatcher_pb2.ToolCall(
                context=self._child,
                call_id=call.call_id,
                tool=call.tool,
                arguments=call.arguments,
                effect=progress.intents[call.call_id].effect,
                attempt=progress.attempts[call.call_id],
                timeout=self._deadlines.bound_call(plan, tool, name=call.tool),
            )
            self.under_way[call.call_id] = self._send(asked)
            self._failed.discard(call.call_id)
            self._post_times[call.call_id] = now
        return next_seconds

    def take_outcomes(self, plan: AgentPlan | None = None) -> None:
        """Records the outcomes that have come, but none of a call whose intent the database has refused.

        With a plan, a failure that may pass is not the call's outcome: it is tried again.
        """
        now = time.perf_counter()
        for call_id in [call_id for call_id, future in self.under_way.items() if future.done()]:
            result = self.under_way.pop(call_id).result()
            duration_ms = to_ms(now - self._post_times.pop(call_id))
            intent = self._journal.progress.intents.get(call_id)
            if intent is not None:
                self._record(plan, intent, result=result, duration_ms=duration_ms)

    def forget(self) -> None:
        """Waits for no answer any more; what is under way goes on, for whoever drives the run next."""
        for future in self.under_way.values():
            future.cancel()
        self.under_way.clear()

    async def stop(self, timeout_seconds: float) -> list[events_pb2.CancelReceipt]:
        """Tells the calls under way to stop, also those of an earlier executor; what they answered before counts.

        Gives a receipt for each that had not answered.
        """
        answered = [call_id for call_id, future in self.under_way.items() if future.done()]
        call_ids = [call_id for call_id in self._journal.progress.lost_calls() if call_id not in answered]
        if not call_ids:
            self.take_outcomes()
            return []
        told = await self._dispatcher.cancel(call_ids, tenant_id=self._tenant_id, timeout_seconds=timeout_seconds)
        receipts = [
            events_pb2.CancelReceipt(call_id=call_id, acknowledged=outcome.acknowledged, after_ms=outcome.after_ms)
            for call_id in call_ids
            if (outcome := told.get(call_id, dispatcher_pb2.CancelOutcome())).found or call_id in self.under_way
        ]
        self.take_outcomes()
        self.forget()
        return receipts

    def _intend(self, call: events_pb2.PlannedCall) -> types_pb2.EffectClass.ValueType:
        """Records the intent, unless the log has it, and tells the effect class that it names."""
        intent = self._journal.progress.intents.get(call.call_id)
        if intent is None:
            effect = self._catalog.effect_of(call.tool, tenant_id=self._tenant_id)
            intent = events_pb2.ToolExecuting(
                call_id=call.call_id, tool=call.tool, arguments=call.arguments, effect=effect, attempt=1
            )
            self._journal.record(tool_executing=intent)
        return intent.effect

    def _send(self, asked: dispatcher_pb2.ToolCall) -> ToolFuture:
        """A call that the queue to the dispatcher has no place for has failed before any worker had it."""
        try:
            return self._dispatcher.calls.post(asked)
        except MainspringError as error:
            future: ToolFuture = asyncio.get_running_loop().create_future()
            status, value = types_pb2.TOOL_STATUS_ERROR, error_value(error)
            future.set_result(dispatcher_pb2.ToolResult(call_id=asked.call_id, status=status, error=value))
            return future

    def _record(
        self,
        plan: AgentPlan | None,
        intent: events_pb2.ToolExecuting,
        *,
        result: dispatcher_pb2.ToolResult,
        duration_ms: float,
    ) -> None:
        attempt = self._journal.progress.attempts[intent.call_id]
        outcome = make_outcome(intent, result, attempt=attempt, duration_ms=duration_ms)
        if plan is not None and outcome.status in _FAILED:
            if intent.effect == types_pb2.EFFECT_CLASS_UNSAFE and outcome.error.reason == Reason.WORKER_LOST.name:
                # As after a crash of this process: a person has to say what became of it.
                ask(self._journal, make_question(intent))
                return
            failure = Failure(outcome.error, outcome.attempts, intent.effect, result.attempts)
            retry_time = self._decide_retry(plan, failure)
            if retry_time is not None:
                failed = make_failure(failure, retry_time=retry_time, call_id=intent.call_id)
                self._failed.add(intent.call_id)
                self._journal.record(attempt_failed=failed, safe_to_skip=True)
                self._journal.flush()
                return
        self._journal.record(tool_completed=outcome)

    def _decide_retry(self, plan: AgentPlan, failure: Failure) -> float | None:
        now, deadline = time.time(), self._deadlines.nearest
        if failure.effect == types_pb2.EFFECT_CLASS_UNSAFE:
            # Whoever took the run up in a longer wait would not know whether this call was made again.
            deadline = min(deadline, now + PAUSE_SECONDS_MAX)
        return decide_retry(
            plan.errors,
            failure,
            retries_left=plan.retries_max - self._journal.progress.retries,
            chance=random.random(),
            now=now,
            deadline=deadline,
        )
