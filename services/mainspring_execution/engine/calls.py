"""The tool calls of one run: intents before effects, calls under way, outcomes, and the word to stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from mainspring.v1 import dispatcher_pb2, events_pb2, types_pb2
from mainspring_kit.identity import UserExecutionContext, new_id

from mainspring_execution.core.decision import needs_durable_intent, refuse_call
from mainspring_execution.core.plan import AgentPlan
from mainspring_execution.core.record import error_value, make_outcome, to_ms
from mainspring_execution.engine.catalog import Catalog
from mainspring_execution.engine.journal import Journal
from mainspring_execution.peers import Dispatcher

ToolFuture = asyncio.Future[dispatcher_pb2.ToolResult]


class Calls:
    """Makes the calls of one run. `under_way`: those sent and not yet recorded, by call_id."""

    def __init__(
        self, journal: Journal, context: UserExecutionContext, *, dispatcher: Dispatcher, catalog: Catalog
    ) -> None:
        self.under_way: dict[str, ToolFuture] = {}
        self._journal = journal
        self._tenant_id = context.tenant_id
        # What all calls' contexts have in common: children of the run's.
        self._child = context.to_message()
        self._child.parent_request_id = context.request_id
        self._child.depth = context.depth + 1
        self._dispatcher = dispatcher
        self._catalog = catalog
        self._post_time = 0.0

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

    def post(self, planned: Sequence[events_pb2.PlannedCall]) -> None:
        """Sends the calls that have no outcome and are not under way."""
        self._post_time = time.perf_counter()
        progress = self._journal.progress
        for call in planned:
            if call.call_id in progress.outcomes or call.call_id in self.under_way:
                continue
            self._child.request_id = new_id()
            asked = dispatcher_pb2.ToolCall(
                context=self._child,
                call_id=call.call_id,
                tool=call.tool,
                arguments=call.arguments,
                effect=progress.intents[call.call_id].effect,
                attempt=progress.attempts[call.call_id],
            )
            self.under_way[call.call_id] = self._dispatcher.calls.post(asked)

    def take_outcomes(self) -> None:
        """Records the outcomes that have come, but none of a call whose intent the database has refused."""
        duration_ms = to_ms(time.perf_counter() - self._post_time)
        for call_id in [call_id for call_id, future in self.under_way.items() if future.done()]:
            result = self.under_way.pop(call_id).result()
            if call_id in self._journal.progress.intents:
                self._record(call_id, result, duration_ms=duration_ms)

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

    def _record(self, call_id: str, result: dispatcher_pb2.ToolResult, *, duration_ms: float) -> None:
        intent = self._journal.progress.intents[call_id]
        self._journal.record(tool_completed=make_outcome(intent, result, duration_ms=duration_ms))
