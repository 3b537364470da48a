"""The attempts at one model step: which of a model's fallbacks the next one asks, and when it is made."""

from __future__ import annotations

from collections.abc import Sequence

from mainspring.v1 import events_pb2, types_pb2

from mainspring_execution.core.plan import AgentPlan
from mainspring_execution.core.policy import (
    EXHAUSTED,
    PAUSE_SECONDS_MAX,
    TIMEOUT,
    UNAVAILABLE,
    Failure,
    asked_seconds,
    class_of,
    decide_retry,
    policy_of,
)

# Another provider may do what this one cannot now; what is wrong stays wrong wherever it is asked.
_ELSEWHERE = (TIMEOUT, UNAVAILABLE, EXHAUSTED)


def choose_fallback(
    plan: AgentPlan, failures: Sequence[events_pb2.AttemptFailed], *, fallbacks: int
) -> tuple[int, int]:
    """Which of so many fallbacks is asked after these failures, 0: none yet; and how often it has failed.

    It is the next one's turn when one has had all its attempts, or asks to be left alone for long.
    """
    chosen = attempts = 0
    for failed in failures:
        if is_faulty_answer(failed.error):
            continue
        attempts += 1
        policy = policy_of(plan.errors, Failure(failed.error, attempts))
        is_used_up = policy is None or attempts >= policy.attempts
        is_away = is_used_up or asked_seconds(failed.error) > PAUSE_SECONDS_MAX
        if chosen < fallbacks and is_away and class_of(failed.error) in _ELSEWHERE:
            chosen, attempts = chosen + 1, 0
    return chosen, attempts


def decide_next_attempt(
    plan: AgentPlan,
    failures: Sequence[events_pb2.AttemptFailed],
    *,
    error: types_pb2.RunError,
    fallbacks: int,
    repairs: int,
    retries_left: int,
    chance: float,
    now: float,
    deadline: float,
) -> float | None:
    """When the step is tried again after a failure that is not in `failures` yet, as `decide_retry` says it."""
    if is_faulty_answer(error) and repairs:
        told = sum(is_faulty_answer(failed.error) for failed in failures)
        return now if told < repairs and retries_left > 0 else None
    chosen, attempts = choose_fallback(plan, failures, fallbacks=fallbacks)
    after = [*failures, events_pb2.AttemptFailed(error=error)]
    if choose_fallback(plan, after, fallbacks=fallbacks)[0] > chosen:
        return now if retries_left > 0 and now < deadline else None
    return decide_retry(
        plan.errors,
        Failure(error, attempts + 1),
        retries_left=retries_left,
        chance=chance,
        now=now,
        deadline=deadline,
    )


def is_faulty_answer(error: types_pb2.RunError) -> bool:
    """Whether the model answered, and may answer rightly when it is told what was wrong."""
    return error.reason == "RESULT_INVALID"
