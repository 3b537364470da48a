"""How a run ends: the outcomes of its last calls, its stages and durations, and the one terminal event."""

from __future__ import annotations

import time
from typing import Final

from mainspring.v1 import events_pb2, state_pb2, types_pb2
from mainspring_kit.errors import MainspringError, Reason
from mainspring_kit.identity import new_id

from mainspring_execution.core.plan import AgentPlan
from mainspring_execution.core.record import (
    COMPLETION,
    INITIALIZATION,
    POSTPROCESSING,
    PREPROCESSING,
    close_calls,
    error_value,
    make_metrics,
    measure_stages,
    to_ms,
    usage,
)
from mainspring_execution.engine.attention import Attention
from mainspring_execution.engine.calls import Calls
from mainspring_execution.engine.checking import check
from mainspring_execution.engine.journal import Journal
from mainspring_execution.engine.tree import Tree
from mainspring_execution.peers import CANCEL_SECONDS

STOP_SECONDS: Final = 1.0


class Ending:
    """Ends one run. Every way to end leaves no call open in the log."""

    def __init__(self, journal: Journal, calls: Calls, *, tree: Tree, attention: Attention, arrived: float) -> None:
        """`arrived`: when the start or the claim came, on the clock of perf_counter."""
        self._journal = journal
        self._calls = calls
        self._tree = tree
        self._attention = attention
        self._marks = {INITIALIZATION: arrived}
        self._began = 0.0
        self._carried_seconds = 0.0

    def begin(self, *, carried_seconds: float = 0.0) -> None:
        """The run has its first event; `carried_seconds`: since when, where another executor recorded it."""
        self._carried_seconds = carried_seconds
        self.mark(PREPROCESSING)
        self._began = self._marks[PREPROCESSING] - carried_seconds

    def mark(self, stage: str) -> None:
        """A stage begins, unless it has."""
        if stage not in self._marks:
            self._marks[stage] = time.perf_counter()

    async def completed(self, plan: AgentPlan, result: bytes) -> None:
        """agent_completed, or agent_failed / RESULT_INVALID."""
        self.mark(POSTPROCESSING)
        error = await check(plan, result)
        if error is not None:
            self._end_failed(error_value(error))
            return
        self.mark(COMPLETION)
        completed = events_pb2.AgentCompleted(result=result, usage=usage(self._journal.progress))
        completed.duration_ms, stages = self._measure()
        completed.stages.extend(stages)
        self._end(agent_completed=completed)

    async def failed(self, error: types_pb2.RunError) -> None:
        """agent_failed; calls and sub-runs under way are told to stop, as in every end but the first."""
        await self._stop(STOP_SECONDS)
        self._close(error)
        self._end_failed(error)

    async def timed_out(self, run: types_pb2.Run) -> None:
        """agent_timed_out; calls under way are told to stop."""
        timeout_seconds = (run.deadline.ToNanoseconds() - run.create_time.ToNanoseconds()) / 1e9
        await self._stop(STOP_SECONDS)
        open_calls = [call.tool for call in self._journal.progress.open_calls()]
        doing = f"it was waiting for {', '.join(open_calls)[:500]}" if open_calls else "its model was thinking"
        error = MainspringError(
            Reason.RUN_TIMED_OUT,
            f"Run {run.run_id} did not end within {timeout_seconds:.6g} s; {doing}. Raise limits.timeout, "
            "or make it do less.",
            run_id=run.run_id,
            timeout_seconds=f"{timeout_seconds:.6g}",
        )
        self._close(None)
        self.mark(COMPLETION)
        ended = events_pb2.AgentTimedOut(error=error_value(error), usage=usage(self._journal.progress))
        ended.duration_ms, stages = self._measure()
        ended.stages.extend(stages)
        self._end(agent_timed_out=ended)

    async def cancelled(self, request: state_pb2.RunInput) -> None:
        """agent_cancelled, with a receipt for each call that was under way."""
        receipts = await self._stop(CANCEL_SECONDS)
        self._close(None)
        self.mark(COMPLETION)
        ended = events_pb2.AgentCancelled(
            requested_by=request.requested_by,
            reason=request.cancel.reason,
            receipt=receipts,
            usage=usage(self._journal.progress),
        )
        ended.duration_ms, stages = self._measure()
        ended.stages.extend(stages)
        self._journal.consume(request.request_id)
        self._end(agent_cancelled=ended)

    async def refused(self, refusal: MainspringError, *, attempt: int) -> None:
        """agent_failed / EVENT_REFUSED, or why else an append was not taken, without its payload.

        From the second attempt on without the outcomes of open calls too: it may be those that it refuses.
        """
        await self._stop(STOP_SECONDS)
        error = error_value(refusal)
        if attempt == 1:
            self._close(error)
        self._end_failed(error)

    async def _stop(self, timeout_seconds: float) -> list[events_pb2.CancelReceipt]:
        await self._tree.cancel_sub_runs()
        return await self._calls.stop(timeout_seconds)

    def _close(self, error: types_pb2.RunError | None) -> None:
        """Closes the calls and questions that are open: with the error, or as cancelled with the run."""
        self.mark(POSTPROCESSING)
        status = types_pb2.TOOL_STATUS_ERROR if error is not None else types_pb2.TOOL_STATUS_CANCELLED
        closing = error if error is not None else error_value(_call_cancelled())
        for asked in list(self._journal.progress.approvals.values()):
            withdrawn = events_pb2.ApprovalResolved(
                approval_id=asked.approval_id, decision=types_pb2.APPROVAL_DECISION_WITHDRAWN
            )
            self._journal.record(approval_resolved=withdrawn)
        for outcome in close_calls(self._journal.progress, closing, status=status):
            self._journal.record(tool_completed=outcome)

    def _end_failed(self, error: types_pb2.RunError) -> None:
        self.mark(POSTPROCESSING)
        self.mark(COMPLETION)
        ended = events_pb2.AgentFailed(error=error, usage=usage(self._journal.progress))
        ended.duration_ms, stages = self._measure()
        ended.stages.extend(stages)
        self._end(agent_failed=ended)

    def _measure(self) -> tuple[float, list[types_pb2.Stage]]:
        """The run's duration in milliseconds, 0 if it never began, and its stages."""
        now = time.perf_counter()
        stages = measure_stages(self._marks, end=now, carried_seconds=self._carried_seconds)
        return (to_ms(now - self._began) if self._began else 0.0), stages

    def _end(self, **payload: object) -> None:
        self._attention.is_ending = True
        self._journal.record(**payload)
        self._journal.flush(metrics=make_metrics(self._journal.progress))


def _call_cancelled() -> MainspringError:
    return MainspringError(
        Reason.TOOL_CANCELLED, "The call was cancelled because its run was ended. Start the run again if it is wanted."
    )


def internal_fault(run_id: str) -> MainspringError:
    """The error of a run that met a fault of ours; the log holds it under the request id."""
    return MainspringError(
        Reason.INTERNAL,
        f"A fault of ours ended run {run_id}: report it with that id.",
        request_id=new_id(),
        run_id=run_id,
    )
