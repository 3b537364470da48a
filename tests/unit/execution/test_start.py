"""A start is checked before anything is durable, and hashed by what the client asked for."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from mainspring.v1 import execution_pb2, registry_pb2, state_pb2
from mainspring_execution.core.start import check_known_run_id, check_run_id, hash_request, make_create, read_input
from mainspring_kit.errors import MainspringError

from tests.unit.execution.samples import ENVELOPE, RUN_ID, plan

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("data", [b"{", b"nul", b"\xff", b"{'a':1}", b'{"a":18446744073709551616}'])
def test_an_input_that_is_not_json_or_loses_an_integer_is_refused(data: bytes) -> None:
    with pytest.raises(MainspringError) as raised:
        read_input(data)
    assert (raised.value.reason_name, raised.value.violations[0].field) == ("REQUEST_INVALID", "start.input")


def test_an_input_is_kept_to_the_byte_and_empty_is_an_object() -> None:
    assert read_input(b'{"a": 1.50}') == b'{"a": 1.50}'
    assert read_input(b"") == b"{}"


@pytest.mark.parametrize("run_id", ["", "x", RUN_ID.upper(), "01890a5d-ac96-474b-bcce-b302099a8057", RUN_ID + "\n"])
def test_a_new_run_needs_a_uuid_of_version_seven(run_id: str) -> None:
    check_run_id(RUN_ID)
    with pytest.raises(MainspringError) as raised:
        check_run_id(run_id)
    assert raised.value.metadata["field"] == "context.run_id"


def test_only_a_uuid_can_name_a_run() -> None:
    check_known_run_id(RUN_ID)
    for run_id in ("", "run-1", RUN_ID + "\n"):
        with pytest.raises(MainspringError) as raised:
            check_known_run_id(run_id)
        assert raised.value.reason_name == "RUN_NOT_FOUND"


def test_the_hash_covers_all_that_was_asked_and_no_boundary_moves() -> None:
    def hashed(session_id: str = "", **fields: object) -> bytes:
        return hash_request(execution_pb2.StartRunRequest(**fields), session_id)  # type: ignore[arg-type]  # by name

    base = hashed(agent="a", input=b"{}")
    assert base == hashed(agent="a", input=b"{}", idempotency_key="any")
    others = [
        hashed(agent="b", input=b"{}"),
        hashed(agent="a", input=b"{ }"),
        hashed(agent="a", alias="x", input=b"{}"),
        hashed(agent="a", version="x", input=b"{}"),
        hashed(agent="a", input=b"{}", session_id="x"),
        hashed("s", agent="a", input=b"{}"),
        hashed(agent="a", input=b"{}", priority=0),
        hashed(agent="a", input=b"{}", priority=1),
        hashed(agent="a", input=b"{}", start_time=Timestamp(seconds=1)),
    ]
    assert len({base, *others}) == 10
    assert hashed(agent="ab", alias="c") != hashed(agent="a", alias="bc")


def test_a_create_carries_the_resolved_version_and_the_deadline() -> None:
    start = execution_pb2.StartRunRequest(agent="lookup", idempotency_key="k1")
    create, event = make_create(
        plan(limits={"timeout": "30s"}),
        start,
        envelope=ENVELOPE,
        user_id="ann",
        asked_session_id="talk-1",
        input_json=b'{"a":1}',
        executor_id="e1",
        follower_id="g1",
        now=1_000.5,
        limits=registry_pb2.TenantLimits(),
    )
    assert not create.caps
    assert not create.queue_only
    assert not create.HasField("due_time")
    assert (create.agent, create.agent_version, create.session_id, create.follower_id) == (
        "lookup",
        "3",
        "talk-1",
        "g1",
    )
    assert create.deadline.ToMilliseconds() == 1_030_500
    assert create.request_hash == hash_request(start, "talk-1")
    assert (event.seq, event.agent_started.input, event.agent_started.attempt) == (1, b'{"a":1}', 1)


def create_of(start: execution_pb2.StartRunRequest, limits: Mapping[str, object]) -> state_pb2.CreateRun:
    create, _ = make_create(
        plan(limits=limits),
        start,
        envelope=ENVELOPE,
        user_id="ann",
        asked_session_id="",
        input_json=b"{}",
        executor_id="e1",
        follower_id="",
        now=1_000.0,
        limits=registry_pb2.TenantLimits(max_concurrent=9, max_concurrent_per_user=4, weight=3, backlog_max=50),
        queue_only=True,
    )
    return create


def test_a_create_says_in_which_caps_it_counts_and_what_is_its_tenants_share() -> None:
    asked = {"max_concurrent": 7, "max_concurrent_per_user": 2, "priority": -3}
    create = create_of(execution_pb2.StartRunRequest(agent="lookup"), asked)
    assert {cap.scope: cap.limit for cap in create.caps} == {
        "tenant": 9,
        "user/ann": 4,
        "agent/lookup": 7,
        "agent/lookup/user/ann": 2,
    }
    assert (create.weight, create.backlog_max, create.priority, create.queue_only) == (3, 50, -3, True)


def test_a_start_may_say_its_own_priority() -> None:
    assert create_of(execution_pb2.StartRunRequest(agent="lookup", priority=0), {"priority": 5}).priority == 0
    assert create_of(execution_pb2.StartRunRequest(agent="lookup"), {"priority": 5}).priority == 5


@pytest.mark.parametrize(("start_seconds", "deadline_seconds"), [(1_500, 1_530), (500, 1_030)])
def test_the_time_for_a_run_counts_from_its_start_time(start_seconds: int, deadline_seconds: int) -> None:
    start = execution_pb2.StartRunRequest(agent="lookup", start_time=Timestamp(seconds=start_seconds))
    create = create_of(start, {"timeout": "30s"})
    assert create.due_time.seconds == start_seconds
    assert create.deadline.seconds == deadline_seconds
