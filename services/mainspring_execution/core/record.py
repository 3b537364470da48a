"""How what happened is written down: call ids, events, error values, stages and their durations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mainspring.v1 import dispatcher_pb2, events_pb2, types_pb2
from mainspring_kit.errors import MainspringError, Reason

from mainspring_execution.core.policy import Failure
from mainspring_execution.core.progress import Progress

INITIALIZATION: Final = "initialization"
PREPROCESSING: Final = "preprocessing"
CORE_EXECUTION: Final = "core_execution"
POSTPROCESSING: Final = "postprocessing"
COMPLETION: Final = "completion"
STAGES: Final = (INITIALIZATION, PREPROCESSING, CORE_EXECUTION, POSTPROCESSING, COMPLETION)
MESSAGE_BYTES_MAX: Final = 4_096
# An event may have 16 MiB; what stands around its payload fits into the rest.
PAYLOAD_BYTES_MAX: Final = (16 << 20) - (64 << 10)
STAGE_MS_MIN: Final = 0.001


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all events of a run have in common."""

    run_id: str
    session_id: str
    agent: str
    trace_id: str
    parent_run_id: str = ""
    root_run_id: str = ""

    def event(self, seq: int, **payload: object) -> events_pb2.RunEvent:
        """An event of the run; `payload` is one of the oneof's fields."""
        return events_pb2.RunEvent(
            run_id=self.run_id,
            seq=seq,
            session_id=self.session_id,
            agent=self.agent,
            trace_id=self.trace_id,
            parent_run_id=self.parent_run_id,
            root_run_id=self.root_run_id,
            **payload,  # type: ignore[arg-type]  # one field of the oneof, by name
        )


def make_call_id(run_id: str, seq: int, *, index: int) -> str:
    """The id of a call that the thinking event `seq` plans: the same whenever it is derived again."""
    return f"{run_id}.{seq}.{index}"


def error_value(error: MainspringError) -> types_pb2.RunError:
    """An error as events and runs carry it."""
    return types_pb2.RunError(
        code=error.code.name,
        reason=error.reason_name,
        message=cut(error.message),
        metadata=error.metadata,
    )


def cut(text: str) -> str:
    """A message cut to the bound of RunError."""
    if len(text) * 4 <= MESSAGE_BYTES_MAX:
        return text
    return text.encode()[:MESSAGE_BYTES_MAX].decode(errors="ignore")


def usage(progress: Progress) -> types_pb2.Usage:
    """The sum over the model steps."""
    return types_pb2.Usage(
        input_tokens=progress.input_tokens, output_tokens=progress.output_tokens, cost_usd=progress.cost_usd
    )


def make_metrics(progress: Progress) -> types_pb2.RunMetrics:
    """What only the executor counts for the run's row of metrics; the rest is in the terminal event, or state's own."""
    return types_pb2.RunMetrics(
        model_calls=progress.model_calls,
        tool_calls=progress.tool_calls,
        tool_errors=progress.tool_errors,
        cache_hits=progress.cache_hits,
        retries=progress.retries,
        waiting_ms=progress.waiting_ms,
    )


def measure_stages(marks: Mapping[str, float], *, end: float, carried_seconds: float = 0.0) -> list[types_pb2.Stage]:
    """The stages gone through; `marks`: the second at which each began, in order, `end`: when the last one ended.

    A duration is rounded up to the microsecond, so that none that was gone through is of zero length. What went by
    under earlier executors, `carried_seconds`, is counted to core_execution.
    """
    ends = [*list(marks.values())[1:], end]
    stages = []
    for (name, since), until in zip(marks.items(), ends, strict=True):
        carried = carried_seconds if name == CORE_EXECUTION else 0.0
        stages.append(types_pb2.Stage(name=name, duration_ms=to_ms(until - since + carried)))
    return stages


def to_ms(seconds: float) -> float:
    """Seconds as milliseconds, rounded up to the microsecond; at least one of those."""
    return max(STAGE_MS_MIN, math.ceil(seconds * 1e6 - 0.0005) / 1e3)


def make_outcome(
    intent: events_pb2.ToolExecuting, result: dispatcher_pb2.ToolResult, *, attempt: int = 1, duration_ms: float
) -> events_pb2.ToolCompleted:
    """The outcome of a call as the log keeps it; one that no event could hold becomes an error.

    `attempt`: with which the call was sent; each execution beyond the first counts as another one.
    """
    outcome = events_pb2.ToolCompleted(
        call_id=intent.call_id,
        tool=intent.tool,
        status=result.status or types_pb2.TOOL_STATUS_ERROR,
        cached=result.cached,
        duration_ms=duration_ms,
        attempts=attempt + max(result.attempts, 1) - 1,
    )
    if len(result.result) > PAYLOAD_BYTES_MAX:
        outcome.status = types_pb2.TOOL_STATUS_ERROR
        outcome.error.CopyFrom(error_value(_result_too_large(intent.tool, len(result.result))))
    elif outcome.status == types_pb2.TOOL_STATUS_OK:
        outcome.result = result.result or b"null"
    else:
        outcome.error.CopyFrom(result.error)
    return outcome


def make_failure(
    failure: Failure,
    *,
    retry_time: float,
    step: int = 0,
    call_id: str = "",
    usage: types_pb2.Usage | None = None,
) -> events_pb2.AttemptFailed:
    """A failed attempt at a model step or a call as the log keeps it; `retry_time` in seconds since 1970."""
    failed = events_pb2.AttemptFailed(
        step=step, call_id=call_id, attempt=failure.attempt, error=failure.error, usage=usage
    )
    failed.retry_time.FromMicroseconds(math.ceil(retry_time * 1e6))
    return failed


def _result_too_large(tool: str, size_bytes: int) -> MainspringError:
    return MainspringError(
        Reason.PAYLOAD_TOO_LARGE,
        f"The result of {tool} has {size_bytes} bytes, at most {PAYLOAD_BYTES_MAX} are kept: let it store them and "
        "return their address.",
        field="result",
        bytes=size_bytes,
        limit=PAYLOAD_BYTES_MAX,
    )


def close_calls(
    progress: Progress, error: types_pb2.RunError, *, status: types_pb2.ToolStatus.ValueType
) -> list[events_pb2.ToolCompleted]:
    """Outcomes for the calls that were begun and will get none any more: a terminal event leaves no call open."""
    closed = []
    for call_id in progress.begun_calls():
        intent = progress.intents[call_id]
        outcome = events_pb2.ToolCompleted(
            call_id=call_id, tool=intent.tool, status=status, error=error, attempts=progress.attempts[call_id]
        )
        outcome.error.metadata["tool"] = intent.tool
        outcome.error.metadata["call_id"] = call_id
        closed.append(outcome)
    return closed
