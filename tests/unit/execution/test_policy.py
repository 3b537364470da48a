"""What becomes of a failed attempt: by class, by effect, by what is left of budget and time."""

from __future__ import annotations

import math
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mainspring.v1 import types_pb2
from mainspring_execution.core.policy import ErrorPolicy, Failure, class_of, decide_retry

from tests.unit.execution.samples import plan

pytestmark = pytest.mark.unit

PURE, IDEMPOTENT = types_pb2.EFFECT_CLASS_PURE, types_pb2.EFFECT_CLASS_IDEMPOTENT
KEYED, UNSAFE = types_pb2.EFFECT_CLASS_KEYED, types_pb2.EFFECT_CLASS_UNSAFE
NOW = 1_000.0


def error(code: str = "UNAVAILABLE", reason: str = "TOOL_FAILED", **metadata: str) -> types_pb2.RunError:
    return types_pb2.RunError(code=code, reason=reason, metadata=metadata)


# Any: fields of Failure and arguments of decide_retry; what pytest.approx makes has no type that it would tell.
def wait(code: str = "UNAVAILABLE", *, reason: str = "TOOL_FAILED", metadata: Any = None, **changes: Any) -> Any:
    """Seconds until the next attempt, the dice showing 1; None: there is none."""
    left: dict[str, Any] = {"retries_left": 20, "chance": 1.0, "now": NOW, "deadline": math.inf}
    left |= {name: changes.pop(name) for name in list(changes) if name in left}
    policies = changes.pop("policies", {})
    failure = Failure(error(code, reason, **(metadata or {})), **{"attempt": 1, "effect": PURE, **changes})
    time = decide_retry(policies, failure, **left)
    return None if time is None else pytest.approx(time - NOW)


@pytest.mark.parametrize(
    ("code", "error_class"),
    [
        ("DEADLINE_EXCEEDED", "timeout"),
        ("UNAVAILABLE", "unavailable"),
        ("RESOURCE_EXHAUSTED", "exhausted"),
        ("PERMISSION_DENIED", "permission"),
        ("UNAUTHENTICATED", "permission"),
        ("INTERNAL", "internal"),
        ("UNKNOWN", "internal"),
        ("ABORTED", "internal"),
        ("DATA_LOSS", "internal"),
        ("CANCELLED", ""),
        ("NO_CODE_AT_ALL", "invalid"),
    ],
)
def test_each_code_has_a_class(code: str, error_class: str) -> None:
    assert class_of(error(code)) == error_class


def test_every_other_code_is_a_request_that_stays_wrong() -> None:
    others = {"INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "OUT_OF_RANGE", "UNIMPLEMENTED"}
    assert {code.name for code in grpc.StatusCode if class_of(error(code.name)) == "invalid"} == others | {"OK"}


def test_some_reasons_say_more_than_their_code() -> None:
    assert class_of(error("RESOURCE_EXHAUSTED", "PAYLOAD_TOO_LARGE")) == "invalid"
    assert wait("UNAVAILABLE", reason="WORKER_LOST") is None


@pytest.mark.parametrize("code", ["DEADLINE_EXCEEDED", "UNAVAILABLE", "RESOURCE_EXHAUSTED"])
def test_what_may_pass_is_tried_three_times_with_growing_waits(code: str) -> None:
    waits = [wait(code, attempt=attempt, effect=effect) for attempt in (1, 2, 3) for effect in (PURE, KEYED, None)]
    assert waits == [0.2, 0.2, 0.2, 0.4, 0.4, 0.4, None, None, None]


def test_a_fault_is_tried_once_more_where_that_costs_nothing() -> None:
    first = [wait("INTERNAL", effect=effect) for effect in (PURE, IDEMPOTENT, KEYED, UNSAFE, None)]
    assert first == [0.2, 0.2, None, None, None]
    assert wait("INTERNAL", attempt=2) is None
    asked = {"internal": ErrorPolicy(4)}
    again = [wait("INTERNAL", policies=asked, attempt=3, effect=effect) for effect in (PURE, KEYED, UNSAFE, None)]
    assert again == [0.8, 0.8, None, 0.8]


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "PERMISSION_DENIED", "UNAUTHENTICATED", "NOT_FOUND", "CANCELLED"])
def test_what_stays_wrong_is_never_tried_again(code: str) -> None:
    assert wait(code) is None


def test_an_unsafe_call_is_tried_again_only_if_no_worker_had_it() -> None:
    assert wait("UNAVAILABLE", reason="WORKER_UNAVAILABLE", effect=UNSAFE, executions=0) == 0.2
    assert wait("RESOURCE_EXHAUSTED", reason="QUEUE_FULL", effect=UNSAFE, executions=0) == 0.2
    # Whatever a tool says of itself.
    assert wait("UNAVAILABLE", reason="WORKER_UNAVAILABLE", effect=UNSAFE, executions=1) is None


def test_whoever_asks_for_time_gets_it() -> None:
    assert wait(metadata={"retry_after_seconds": "7.5"}) == 7.5
    assert wait(metadata={"retry_after_seconds": "0.1"}) == 0.2
    for nonsense in ("soon", "-3", "nan", ""):
        assert wait(metadata={"retry_after_seconds": nonsense}) == 0.2
    assert wait(metadata={"retry_after_seconds": "inf"}) is None


def test_nothing_is_tried_after_the_deadline_or_over_the_budget() -> None:
    assert wait(deadline=NOW + 0.3) == 0.2
    assert wait(deadline=NOW + 0.2) is None
    assert wait(deadline=NOW + 5, metadata={"retry_after_seconds": "6"}) is None
    assert (wait(retries_left=1), wait(retries_left=0)) == (0.2, None)


@given(st.integers(1, 10_000), st.floats(0, 1), st.floats(0, 60), st.floats(0, 3_600), st.floats(1, 10))
def test_a_wait_is_never_longer_than_its_bound(
    attempt: int, chance: float, initial: float, bound: float, multiplier: float
) -> None:
    policies = {"unavailable": ErrorPolicy(20_000, initial, bound, multiplier)}
    failure = Failure(error(), attempt)
    time = decide_retry(policies, failure, retries_left=1, chance=chance, now=0.0, deadline=math.inf)
    assert time is not None and 0 <= time <= bound


def test_a_plan_says_what_its_specification_leaves_out() -> None:
    errors = {"timeout": {"attempts": 5, "backoff": {"initial": "1s", "max": "1m", "multiplier": 3}}, "internal": {}}
    limits = {"retries": 3, "step_timeout": "20s"}
    read = plan(errors=errors, limits=limits, tool_timeouts={"diagnostics.echo": "5s"})
    assert read.errors == {"timeout": ErrorPolicy(5, 1.0, 60.0, 3.0), "internal": ErrorPolicy(2)}
    assert (read.retries_max, read.step_timeout_seconds, read.model_timeout_seconds) == (3, 20.0, math.inf)
    assert read.tool_timeouts == {"diagnostics.echo": 5.0}
    assert (plan().errors, plan().retries_max) == ({}, 20)
