"""Outcomes: errors of ours as values, and what workers say, checked, for a worker is not part of the platform."""

from __future__ import annotations

from typing import Final

import orjson
from google.rpc import code_pb2
from mainspring.v1 import dispatcher_pb2 as pb
from mainspring.v1 import types_pb2
from mainspring_kit.errors import MainspringError, Reason

ARGUMENTS_BYTES_MAX: Final = 1 << 20
RESULT_BYTES_MAX: Final = 16 << 20
NAME_CHARACTERS_MAX: Final = 128
MESSAGE_CHARACTERS_MAX: Final = 2_048
METADATA_PAIRS_MAX: Final = 16
METADATA_CHARACTERS_MAX: Final = 256

OK: Final = types_pb2.TOOL_STATUS_OK
ERROR: Final = types_pb2.TOOL_STATUS_ERROR
TIMED_OUT: Final = types_pb2.TOOL_STATUS_TIMED_OUT
CANCELLED: Final = types_pb2.TOOL_STATUS_CANCELLED
_WORKER_STATUSES: Final = frozenset({OK, ERROR, TIMED_OUT, CANCELLED})
_CODE_NAMES: Final = frozenset(code_pb2.Code.keys()) - {"OK"}


def failed(error: MainspringError, status: types_pb2.ToolStatus.ValueType = ERROR) -> pb.WorkerResult:
    """An error of ours as the outcome of a call."""
    return pb.WorkerResult(
        status=status,
        error=types_pb2.RunError(
            code=error.code.name, reason=error.reason_name, message=error.message, metadata=error.metadata
        ),
    )


def refusal(call: pb.ToolCall) -> MainspringError | None:
    """Why a call breaks the contract's rules; None: it does not."""
    context = call.context
    for name in ("tenant_id", "user_id", "session_id", "run_id"):
        if not getattr(context, name).strip():
            return MainspringError(
                Reason.CONTEXT_INVALID, f"The call's context has no {name}: send a real identity.", field=name, value=""
            )
    for name in ("call_id", "tool"):
        value = getattr(call, name)
        if not value or len(value) > NAME_CHARACTERS_MAX:
            return MainspringError(
                Reason.REQUEST_INVALID, f"{name} must have 1 to {NAME_CHARACTERS_MAX} characters.", field=name
            )
    if len(call.arguments) > ARGUMENTS_BYTES_MAX:
        return MainspringError(
            Reason.PAYLOAD_TOO_LARGE,
            f"The arguments of {call.tool} have {len(call.arguments)} bytes, at most {ARGUMENTS_BYTES_MAX} may be: "
            "pass a reference instead.",
            field="arguments",
            bytes=len(call.arguments),
            limit=ARGUMENTS_BYTES_MAX,
        )
    if call.effect == types_pb2.EFFECT_CLASS_UNSPECIFIED:
        return MainspringError(Reason.REQUEST_INVALID, "effect must be set, as the intent says.", field="effect")
    if call.HasField("timeout") and call.timeout.ToNanoseconds() <= 0:
        return MainspringError(Reason.REQUEST_INVALID, "timeout must be positive, or unset.", field="timeout")
    return None


def check_hello(hello: pb.AttachHello) -> None:
    """Raises REQUEST_INVALID when a worker's first word breaks the contract's rules."""
    names = [tool.name for tool in hello.tools]
    if not hello.worker_id or len(hello.worker_id) > NAME_CHARACTERS_MAX:
        field, fault = "hello.worker_id", f"must have 1 to {NAME_CHARACTERS_MAX} characters"
    elif not 1 <= len(names) <= 256 or len(set(names)) != len(names):
        field, fault = "hello.tools", "must be 1 to 256 tools of different names"
    elif not 1 <= hello.concurrency <= 10_000:
        field, fault = "hello.concurrency", "must be 1 to 10,000"
    else:
        return
    raise MainspringError(Reason.REQUEST_INVALID, f"The request breaks its rules: {field} {fault}.", field=field)


def checked(result: pb.WorkerResult, tool: str) -> pb.WorkerResult:
    """The result itself when it keeps the contract, else what becomes of it."""
    if result.status == OK:
        if len(result.result) > RESULT_BYTES_MAX:
            return failed(_too_large(tool, len(result.result)))
        try:
            orjson.loads(result.result)
        except orjson.JSONDecodeError as error:
            return failed(_broken(tool, f"its result is not JSON: {error}"))
        return result
    if result.status not in _WORKER_STATUSES:
        return failed(_broken(tool, f"its worker answered with the status {result.status}"))
    if not result.HasField("error"):
        return failed(_broken(tool, "its worker named no error"), result.status)
    said = result.error
    bounded = types_pb2.RunError(
        code=said.code if said.code in _CODE_NAMES else "UNKNOWN",
        reason=said.reason[:NAME_CHARACTERS_MAX] or Reason.TOOL_FAILED.name,
        message=said.message[:MESSAGE_CHARACTERS_MAX],
        metadata={
            key[:METADATA_CHARACTERS_MAX]: value[:METADATA_CHARACTERS_MAX]
            for key, value in sorted(said.metadata.items())[:METADATA_PAIRS_MAX]
        },
    )
    return pb.WorkerResult(status=result.status, error=bounded, duration_ms=result.duration_ms)


def timed_out(tool: str, timeout_seconds: float, *, waiting: bool) -> pb.WorkerResult:
    """The call used up its time, in a worker or in line for one."""
    where = "waited for a free worker" if waiting else "did not answer"
    return failed(
        MainspringError(
            Reason.TOOL_TIMED_OUT,
            f"The tool {tool} {where} within {timeout_seconds:g} s: give it more time or more workers.",
            tool=tool,
            timeout_seconds=f"{timeout_seconds:g}",
        ),
        TIMED_OUT,
    )


def cancelled(tool: str, call_id: str) -> pb.WorkerResult:
    """Somebody cancelled the call, and its worker did not say more."""
    error = MainspringError(
        Reason.TOOL_CANCELLED, f"The call {call_id} of {tool} was cancelled.", tool=tool, call_id=call_id
    )
    return failed(error, CANCELLED)


def unknown(tool: str) -> pb.WorkerResult:
    """Neither the tenant nor everybody has such a tool."""
    message = f"There is no tool {tool} in this tenant: check the name, or attach a worker that serves it."
    return failed(MainspringError(Reason.TOOL_NOT_FOUND, message, tool=tool))


def unserved(tool: str) -> pb.WorkerResult:
    """The tool exists and nobody serves it."""
    message = f"No worker serves the tool {tool} now: start one with `mainspring worker`."
    return failed(MainspringError(Reason.WORKER_UNAVAILABLE, message, tool=tool))


def lost(tool: str, call_id: str, *, executions: int) -> pb.WorkerResult:
    """The last worker that the call may have died in mid-call."""
    return failed(
        MainspringError(
            Reason.WORKER_LOST,
            f"The worker died while it ran the call {call_id} of {tool} (execution {executions}); what the call did is "
            "not known: look before you call again.",
            tool=tool,
            call_id=call_id,
        )
    )


def crowded(limit: int) -> pb.WorkerResult:
    """Too many calls wait already."""
    return failed(
        MainspringError(
            Reason.QUEUE_FULL,
            f"{limit} calls wait for a worker and no more may: wait and try again, or attach more workers.",
            queue="calls",
            limit=limit,
        )
    )


def _too_large(tool: str, size: int) -> MainspringError:
    return MainspringError(
        Reason.PAYLOAD_TOO_LARGE,
        f"The result of {tool} has {size} bytes, at most {RESULT_BYTES_MAX} are allowed: return a reference instead.",
        field="result",
        bytes=size,
        limit=RESULT_BYTES_MAX,
    )


def _broken(tool: str, detail: str) -> MainspringError:
    return MainspringError(
        Reason.TOOL_FAILED, f"The tool {tool} failed: {detail}. Mend the tool or its worker.", tool=tool
    )
