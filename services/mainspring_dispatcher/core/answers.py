"""Who is told what: the callers of a call its outcome, those who cancelled it what became of that."""

from __future__ import annotations

from mainspring.v1 import dispatcher_pb2 as pb

from mainspring_dispatcher.core.parts import Call, Caller


def join(call: Call, caller: Caller, *, item_id: int) -> None:
    """Lets another sender wait for a call under way; those that are gone make room."""
    call.callers = [known for known in call.callers if not known[0].gone and known != (caller, item_id)]
    call.callers.append((caller, item_id))


def answer(
    message: pb.ToolCall, callers: list[tuple[Caller, int]], *, outcome: pb.WorkerResult, executions: int = 0
) -> None:
    for caller, item_id in callers:
        result = pb.ToolResult(
            item_id=item_id,
            call_id=message.call_id,
            status=outcome.status,
            result=outcome.result,
            duration_ms=outcome.duration_ms,
            attempts=executions,
        )
        if outcome.HasField("error"):
            result.error.CopyFrom(outcome.error)
        caller.answer(result)


def tell(call: Call, *, now: float, acknowledged: bool) -> None:
    """Tells those who cancelled what became of it."""
    cancels, call.cancels = call.cancels, []
    for cancel in cancels:
        cancel.told(
            pb.CancelOutcome(
                call_id=call.message.call_id,
                found=True,
                acknowledged=acknowledged,
                after_ms=(now - cancel.time) * 1e3,
            )
        )
