"""Attempts at a model step: fallbacks in their turn, answers that are mended, and nothing without end."""

from __future__ import annotations

from typing import Any

import pytest
from mainspring.v1 import events_pb2, types_pb2
from mainspring_execution.core.attempts import choose_fallback, decide_next_attempt

from tests.unit.execution.samples import plan

pytestmark = pytest.mark.unit

PLAN = plan()
NOW = 1_000.0


def failed(code: str = "UNAVAILABLE", reason: str = "MODEL_FAILED", **metadata: str) -> events_pb2.AttemptFailed:
    return events_pb2.AttemptFailed(error=types_pb2.RunError(code=code, reason=reason, metadata=metadata))


AWAY = failed()
LIMITED = failed("RESOURCE_EXHAUSTED", retry_after_seconds="60")
FAULTY = failed("INVALID_ARGUMENT", "RESULT_INVALID")


def next_time(failures: list[events_pb2.AttemptFailed], last: events_pb2.AttemptFailed, **changes: Any) -> float | None:
    settings: dict[str, Any] = {
        "fallbacks": 0,
        "repairs": 2,
        "retries_left": 20,
        "chance": 1.0,
        "now": NOW,
        "deadline": NOW + 300,
    }
    return decide_next_attempt(PLAN, failures, error=last.error, **{**settings, **changes})


@pytest.mark.parametrize(
    ("failures", "chosen"),
    [
        ([], (0, 0)),
        ([AWAY], (0, 1)),
        ([AWAY] * 3, (1, 0)),
        ([AWAY] * 4, (1, 1)),
        ([AWAY] * 6, (2, 0)),
        ([AWAY] * 9, (2, 3)),
        ([LIMITED], (1, 0)),
        ([LIMITED, LIMITED], (2, 0)),
        ([FAULTY, AWAY, FAULTY, AWAY], (0, 2)),
        ([failed("INVALID_ARGUMENT")] * 5, (0, 5)),
    ],
)
def test_the_next_model_has_its_turn_when_one_has_had_its_attempts(
    failures: list[events_pb2.AttemptFailed], chosen: tuple[int, int]
) -> None:
    assert choose_fallback(PLAN, failures, fallbacks=2) == chosen


def test_a_fallback_is_asked_at_once_and_the_last_one_after_waits_too() -> None:
    assert next_time([AWAY, AWAY], AWAY, fallbacks=1) == NOW
    assert next_time([LIMITED], LIMITED) == NOW + 60
    assert next_time([], LIMITED, fallbacks=1) == NOW
    waited = next_time([AWAY] * 3, AWAY, fallbacks=1)
    assert waited is not None and waited > NOW
    assert next_time([AWAY] * 5, AWAY, fallbacks=1) is None


def test_what_is_wrong_is_wrong_for_fallbacks_too() -> None:
    assert next_time([], failed("INVALID_ARGUMENT"), fallbacks=2) is None
    assert next_time([], failed("PERMISSION_DENIED"), fallbacks=2) is None


def test_a_faulty_answer_is_told_to_its_model_twice() -> None:
    assert next_time([], FAULTY) == NOW
    assert next_time([FAULTY, AWAY], FAULTY) == NOW
    assert next_time([FAULTY, AWAY, FAULTY], FAULTY) is None
    assert next_time([], FAULTY, repairs=0) is None


def test_the_budget_of_the_run_bounds_all_of_it() -> None:
    assert next_time([AWAY, AWAY], AWAY, fallbacks=1, retries_left=0) is None
    assert next_time([], FAULTY, retries_left=0) is None
    assert next_time([AWAY, AWAY], AWAY, fallbacks=1, deadline=NOW) is None
