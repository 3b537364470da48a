"""When schedules fire, in any time zone, and what becomes of times that were missed."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from mainspring.v1 import registry_pb2, types_pb2
from mainspring_kit.errors import MainspringError
from mainspring_registry.core.schedules import (
    MISSED_RUNS_MAX,
    idempotency_key,
    plan_firing,
    read_schedule,
    session_id,
    timetable,
)
from mainspring_registry.core.spec import agent_schema

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
SCHEMA = agent_schema((ROOT / "services/mainspring_registry/schedule.schema.json").read_bytes())
NOON = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)


def schedule(**fields: object) -> registry_pb2.Schedule:
    spec = {
        "apiVersion": "mainspring/v1",
        "kind": "Schedule",
        "name": "nightly",
        "cron": "0 * * * *",
        "agent": "lookup",
    }
    return read_schedule(json.dumps(spec | fields).encode(), SCHEMA)


def test_a_document_is_read_with_its_defaults() -> None:
    read = schedule(input={"b": 1, "a": 2})
    assert (read.name, read.agent, read.input) == ("nightly", "lookup", b'{"a":2,"b":1}')
    assert read.missed == registry_pb2.MISSED_POLICY_ONCE
    assert read.overlap == types_pb2.SESSION_POLICY_ENQUEUE


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"cron": "61 * * * *"}, "cron"),
        ({"cron": "every now and then"}, "cron"),
        ({"cron": "0 0 30 2 *"}, "cron"),
        ({"time_zone": "Mars/Olympus"}, "time_zone"),
        ({"time_zone": "../etc/passwd"}, "time_zone"),
        ({"missed": "sometimes"}, "missed"),
        ({"input": {"text": "x" * 70_000}}, "input"),
        ({"name": "No Spaces"}, "name"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_each_fault_of_a_document_is_told_with_its_field(fields: dict[str, object], field: str) -> None:
    with pytest.raises(MainspringError) as refused:
        schedule(**fields)
    assert refused.value.reason_name == "SPEC_INVALID"
    assert [violation.field for violation in refused.value.violations] == [field]


def test_times_are_those_of_the_zone_also_where_the_clock_is_changed() -> None:
    table = timetable(schedule(cron="30 2 * * *", time_zone="Europe/Berlin"))
    # In the night to 2026-03-29 there is no 02:30, in that to 2026-10-25 there are two.
    assert table.after(datetime(2026, 3, 28, 12, tzinfo=UTC)) == datetime(2026, 3, 29, 1, 0, tzinfo=UTC)
    first = table.after(datetime(2026, 10, 24, 12, tzinfo=UTC))
    assert first == datetime(2026, 10, 25, 0, 30, tzinfo=UTC)
    assert table.after(first) == datetime(2026, 10, 26, 1, 30, tzinfo=UTC)


def test_six_fields_begin_with_seconds() -> None:
    table = timetable(schedule(cron="*/20 * * * * *"))
    assert table.after(NOON) == NOON + timedelta(seconds=20)


def test_what_is_due_fires_for_its_time_and_is_due_again() -> None:
    firing = plan_firing(schedule(), NOON, now=NOON + timedelta(seconds=1))
    assert list(firing.times) == [NOON]
    assert firing.next_time == NOON + timedelta(hours=1)


@pytest.mark.parametrize(
    ("missed", "late", "hours"),
    [
        ("skip", timedelta(minutes=30), []),
        ("once", timedelta(minutes=30), [0]),
        ("all", timedelta(minutes=30), [0]),
        ("skip", timedelta(hours=3), [3]),
        ("once", timedelta(hours=3), [3]),
        ("all", timedelta(hours=3), [0, 1, 2, 3]),
        ("skip", timedelta(hours=3, minutes=5), []),
        ("once", timedelta(hours=3, minutes=5), [3]),
    ],
)
def test_missed_times_are_left_out_or_made_up_for(missed: str, late: timedelta, hours: list[int]) -> None:
    firing = plan_firing(schedule(missed=missed), NOON, now=NOON + late)
    assert list(firing.times) == [NOON + timedelta(hours=hour) for hour in hours]


def test_only_the_latest_of_very_many_missed_times_are_made_up_for() -> None:
    now = NOON + timedelta(days=30)
    firing = plan_firing(schedule(missed="all", cron="* * * * * *"), NOON, now=now)
    assert len(firing.times) == MISSED_RUNS_MAX
    assert firing.times[-1] == now
    assert list(firing.times) == sorted(firing.times)


def test_one_time_has_one_key_and_each_overlap_a_session_of_its_own() -> None:
    read = schedule(overlap="reject")
    assert idempotency_key(read, NOON) == "schedule/nightly/2026-11-25T12:00:00Z"
    assert session_id(read) == "schedule:nightly:reject"
