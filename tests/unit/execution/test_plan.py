"""A plan is read from a specification, with bounds where it has none."""

from __future__ import annotations

import pytest
from mainspring_execution.core.plan import STEPS_DEFAULT, TIMEOUT_SECONDS_DEFAULT, read_seconds
from mainspring_kit.errors import MainspringError

from tests.unit.execution.samples import plan

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "seconds"), [("100ms", 0.1), ("30s", 30.0), ("1.5m", 90.0), ("1h", 3600.0), (2, 2.0), ("7", 7.0)]
)
def test_durations_have_units(text: object, seconds: float) -> None:
    assert read_seconds(text, field="x") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "soon", "-1s", -1, None, "1d", True, "1s2s"])
def test_what_is_no_duration_is_refused(text: object) -> None:
    with pytest.raises(MainspringError, match=r"limits\.timeout"):
        read_seconds(text, field="limits.timeout")


def test_limits_have_defaults_and_bounds() -> None:
    bare, wide = plan(), plan(limits={"timeout": "48h", "max_steps": 9_999})
    assert (bare.timeout_seconds, bare.steps_max) == (TIMEOUT_SECONDS_DEFAULT, STEPS_DEFAULT)
    assert (wide.timeout_seconds, wide.steps_max) == (86_400.0, 1_000)
    assert plan(limits={"timeout": "250ms", "max_steps": 2}).timeout_seconds == 0.25


def test_a_schema_that_is_none_is_refused() -> None:
    with pytest.raises(MainspringError) as raised:
        plan(output_schema=["nonsense"])
    assert raised.value.metadata["field"] == "output_schema"


def test_agents_and_handoffs_are_called_by_name() -> None:
    read = plan(
        tools=["diagnostics.echo", {"agent": "helper"}, {"agent": "critic", "on_failure": "fail_fast"}],
        handoffs=["expert"],
    )
    assert read.tools == {"diagnostics.echo", "agent.helper", "agent.critic", "handoff.expert"}
    assert read.fail_fast == {"agent.critic"}
    assert plan().fail_fast == frozenset()


def test_caps_and_priority_are_none_where_none_are_asked_for() -> None:
    bare = plan()
    assert (bare.concurrent_max, bare.concurrent_per_user_max, bare.priority) == (0, 0, 0)
    asked = plan(limits={"max_concurrent": 9, "max_concurrent_per_user": 2, "priority": -7})
    assert (asked.concurrent_max, asked.concurrent_per_user_max, asked.priority) == (9, 2, -7)
