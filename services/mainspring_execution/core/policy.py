"""What becomes of a failed attempt: the class of its error, whether another one is made, and when.

The clock and the dice are the caller's, so that a takeover decides as the first executor would have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mainspring.v1 import types_pb2

TIMEOUT: Final = "timeout"
UNAVAILABLE: Final = "unavailable"
EXHAUSTED: Final = "exhausted"
INVALID: Final = "invalid"
PERMISSION: Final = "permission"
INTERNAL: Final = "internal"

ATTEMPTS_MAX: Final = 100
RETRIES_DEFAULT: Final = 20
# Under it a run stays with its executor, and in its memory; above it the run is given back until its time has come.
PAUSE_SECONDS_MAX: Final = 2.0

_CLASS_BY_CODE: Final = {
    "DEADLINE_EXCEEDED": TIMEOUT,
    "UNAVAILABLE": UNAVAILABLE,
    "RESOURCE_EXHAUSTED": EXHAUSTED,
    "PERMISSION_DENIED": PERMISSION,
    "UNAUTHENTICATED": PERMISSION,
    "INTERNAL": INTERNAL,
    "UNKNOWN": INTERNAL,
    "ABORTED": INTERNAL,
    "DATA_LOSS": INTERNAL,
}
# Their code says that another attempt may help, and it does not: the dispatcher has made the other executions of a
# call whose workers died, and a payload stays too large.
_FINAL_REASONS: Final = frozenset({"WORKER_LOST", "PAYLOAD_TOO_LARGE"})


@dataclass(frozen=True, slots=True)
class ErrorPolicy:
    """How often an attempt is made in all, and how long the waits between are at most."""

    attempts: int
    initial_seconds: float = 0.2
    seconds_max: float = 30.0
    multiplier: float = 2.0


# The other classes stay as they are however often they are asked. By default an internal error is repeated only where
# that neither has an effect nor costs money: for calls of pure and idempotent tools.
DEFAULT_POLICIES: Final[Mapping[str, ErrorPolicy]] = {
    TIMEOUT: ErrorPolicy(3),
    UNAVAILABLE: ErrorPolicy(3),
    EXHAUSTED: ErrorPolicy(3),
    INTERNAL: ErrorPolicy(2),
}


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed attempt. `effect` None: it was a model step. `executions`: how often a worker was given the call."""

    error: types_pb2.RunError
    attempt: int
    effect: types_pb2.EffectClass.ValueType | None = None
    executions: int = 1


def class_of(error: types_pb2.RunError) -> str:
    """The class of an error; empty for one of a cancelled call, which has none."""
    if error.code == "CANCELLED":
        return ""
    return INVALID if error.reason in _FINAL_REASONS else _CLASS_BY_CODE.get(error.code, INVALID)


def decide_retry(
    policies: Mapping[str, ErrorPolicy],
    failure: Failure,
    *,
    retries_left: int,
    chance: float,
    now: float,
    deadline: float,
) -> float | None:
    """When the next attempt is made, in seconds since 1970, as `now` and `deadline` are; None: the failure stands.

    `policies`: what the specification says, by class. `chance`: from 0 to 1, another one each time.
    """
    policy = policy_of(policies, failure)
    if policy is None or failure.attempt >= policy.attempts or retries_left <= 0:
        return None
    if failure.effect == types_pb2.EFFECT_CLASS_UNSAFE and failure.executions:
        return None  # a worker had it: what it did is not known
    # Full jitter: those that failed together do not come back together.
    growth = policy.multiplier ** min(failure.attempt - 1, ATTEMPTS_MAX)
    back_off = chance * min(policy.seconds_max, policy.initial_seconds * growth)
    time = now + max(back_off, asked_seconds(failure.error))
    return time if time < deadline else None


def asked_seconds(error: types_pb2.RunError) -> float:
    """How long whoever failed asks to be left alone: `retry_after_seconds` of the metadata."""
    try:
        seconds = float(error.metadata.get("retry_after_seconds", "0"))
    except ValueError:
        return 0.0
    return seconds if seconds > 0 else 0.0


def policy_of(policies: Mapping[str, ErrorPolicy], failure: Failure) -> ErrorPolicy | None:
    """What is done about a failure; None: nothing."""
    error_class = class_of(failure.error)
    is_free = failure.effect in (types_pb2.EFFECT_CLASS_PURE, types_pb2.EFFECT_CLASS_IDEMPOTENT)
    default = None if error_class == INTERNAL and not is_free else DEFAULT_POLICIES.get(error_class)
    return policies.get(error_class, default)
