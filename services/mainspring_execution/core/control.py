"""What is asked of a run from outside, checked before it is made durable."""

from __future__ import annotations

from typing import Final

import orjson
from mainspring.v1 import types_pb2
from mainspring_kit.errors import MainspringError, Reason

from mainspring_execution.core.schema import Schema, TooCostlyError
from mainspring_execution.core.start import check_json

ANSWER_STEPS_MAX: Final = 5_000


def check_answer(approval: types_pb2.Approval, decision: types_pb2.ApprovalDecision.ValueType, *, data: bytes) -> bytes:
    """The answer's data, as it is stored. ANSWER_INVALID when leave is given with other data than asked for."""
    check_json(data, field="data")
    if decision != types_pb2.APPROVAL_DECISION_ALLOW or not approval.answer_schema:
        return data
    schema = Schema(orjson.loads(approval.answer_schema))
    try:
        fault = schema.first_fault(orjson.loads(data or b"null"), steps_max=ANSWER_STEPS_MAX)
    except TooCostlyError:
        raise _answer_invalid(approval, "$", fault="it takes too many steps to check") from None
    if fault is not None:
        raise _answer_invalid(approval, fault.path, fault=fault.message)
    return data


def _answer_invalid(approval: types_pb2.Approval, path: str, *, fault: str) -> MainspringError:
    return MainspringError(
        Reason.ANSWER_INVALID,
        f"The answer to approval {approval.approval_id} does not match its schema at {path}: {fault[:500]}. "
        "Read the approval's answer_schema and answer again.",
        approval_id=approval.approval_id,
        path=path,
    )
