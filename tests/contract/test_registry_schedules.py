"""Schedules over the wire: put, read, listed, deleted, taken when due by one process, and never another tenant's."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import grpc
import pytest
from mainspring.v1 import registry_pb2 as pb

from test_framework.grpc_testing import error_of, violations_of
from test_framework.identities import Identities, unique
from tests.contract.registry_calls import TIMEOUT

pytestmark = pytest.mark.contract
grpc_service = "Registry"


def document(name: str, **changes: object) -> bytes:
    """A right specification, with changes. It fires once a year."""
    spec = {"apiVersion": "mainspring/v1", "kind": "Schedule", "name": name, "cron": "0 0 1 1 *", "agent": "lookup"}
    return json.dumps(spec | changes).encode()


class Tenant:
    """A tenant of a test's own, and calls as its users. Any: generated stubs have no common base."""

    def __init__(self, stub: Any, identities: Identities) -> None:
        self.tenant_id = unique("tenant")
        self._stub = stub
        self._identities = identities

    def call(self, method: str, request: object, *, role: str = "admin") -> Any:
        """The answer of a call as a user of the tenant."""
        metadata = self._identities.metadata(self.tenant_id, "ann", role)
        return getattr(self._stub, method)(request, metadata=metadata, timeout=TIMEOUT)

    def put(self, name: str, **changes: object) -> pb.Schedule:
        """Puts a schedule."""
        response: pb.PutScheduleResponse = self.call(
            "PutSchedule", pb.PutScheduleRequest(document=document(name, **changes))
        )
        return response.schedule

    def reason(self, method: str, request: object, *, role: str = "admin") -> str:
        """Why a call is refused."""
        with pytest.raises(grpc.RpcError) as raised:
            self.call(method, request, role=role)
        return error_of(raised.value).reason


@pytest.fixture
def tenant(grpc_stub: Any, identities: Identities) -> Tenant:
    """A tenant without schedules."""
    return Tenant(grpc_stub, identities)


def test_a_schedule_is_put_read_and_deleted(tenant: Tenant) -> None:
    stored = tenant.put("nightly", input={"a": 1})
    assert (stored.user_id, stored.input) == ("ann", b'{"a":1}')
    assert stored.next_time.ToDatetime() == datetime(datetime.now(UTC).year + 1, 1, 1)
    assert tenant.call("GetSchedule", pb.GetScheduleRequest(name="nightly")).schedule == stored
    again = tenant.put("nightly", cron="0 12 1 1 *")
    assert again.create_time == stored.create_time
    assert again.next_time.ToDatetime().hour == 12
    tenant.call("DeleteSchedule", pb.DeleteScheduleRequest(name="nightly"))
    assert tenant.reason("GetSchedule", pb.GetScheduleRequest(name="nightly")) == "SCHEDULE_NOT_FOUND"
    assert tenant.reason("DeleteSchedule", pb.DeleteScheduleRequest(name="nightly")) == "SCHEDULE_NOT_FOUND"


def test_schedules_are_listed_in_pages_and_only_the_tenants_own(
    tenant: Tenant, grpc_stub: Any, identities: Identities
) -> None:
    for name in ("c", "a", "b"):
        tenant.put(name)
    page = tenant.call("ListSchedules", pb.ListSchedulesRequest(page_size=2))
    rest = tenant.call("ListSchedules", pb.ListSchedulesRequest(page_size=2, page_token=page.next_page_token))
    assert [found.name for found in [*page.schedules, *rest.schedules]] == ["a", "b", "c"]
    assert not rest.next_page_token
    stranger = Tenant(grpc_stub, identities)
    assert not stranger.call("ListSchedules", pb.ListSchedulesRequest()).schedules
    assert stranger.reason("GetSchedule", pb.GetScheduleRequest(name="a")) == "SCHEDULE_NOT_FOUND"
    assert stranger.reason("DeleteSchedule", pb.DeleteScheduleRequest(name="a")) == "SCHEDULE_NOT_FOUND"


def test_a_faulty_specification_is_refused_with_its_field(tenant: Tenant) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        tenant.call("PutSchedule", pb.PutScheduleRequest(document=document("nightly", cron="99 * * * *")))
    assert error_of(raised.value).reason == "SPEC_INVALID"
    assert list(violations_of(raised.value)) == ["cron"]
    assert (
        tenant.reason("PutSchedule", pb.PutScheduleRequest(document=document("a")), role="operator") == "ROLE_REQUIRED"
    )


async def test_a_due_schedule_is_one_process_alone(tenant: Tenant, contract_environment: dict[str, Any]) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(tenant.put, (f"due-{number}" for number in range(8))))
    owner = await asyncpg.connect(contract_environment["owner_database_url"])
    # Another registry process would hold them for a minute: this one, whose clockwork runs, may take none of them.
    await owner.execute(
        "UPDATE registry.schedules SET next_time = now() - interval '1 s', busy_until = now() + interval '1 min' "
        "WHERE tenant_id = $1",
        tenant.tenant_id,
    )
    taken = "SELECT name FROM registry.take_due_schedules(100, 60) WHERE tenant_id = $1"
    assert not await owner.fetch(taken, tenant.tenant_id)
    await owner.execute(
        "UPDATE registry.schedules SET busy_until = now() - interval '1 s', paused = name = 'due-0' "
        "WHERE tenant_id = $1",
        tenant.tenant_id,
    )
    # The clockwork of the process under test may be quicker: whoever it was, each is taken once.
    await owner.fetch(taken, tenant.tenant_id)
    busy = await owner.fetch(
        "SELECT name FROM registry.schedules WHERE tenant_id = $1 AND busy_until > now()", tenant.tenant_id
    )
    assert {row["name"] for row in busy} == {f"due-{number}" for number in range(1, 8)}
    assert not await owner.fetch(taken, tenant.tenant_id)
    await owner.close()


async def test_what_a_firing_came_to_is_not_kept_for_a_schedule_put_anew(
    tenant: Tenant, contract_environment: dict[str, Any]
) -> None:
    stored = tenant.put("nightly")
    owner = await asyncpg.connect(contract_environment["owner_database_url"])
    was_due = stored.next_time.ToDatetime(tzinfo=UTC)
    settle = "SELECT registry.settle_schedule($1, 'nightly', $2, $3, $4, 'run', NULL)"
    for due, kept in ((was_due - timedelta(seconds=1), ""), (was_due, "run")):
        await owner.execute(settle, tenant.tenant_id, due, was_due + timedelta(days=365), was_due)
        found = tenant.call("GetSchedule", pb.GetScheduleRequest(name="nightly")).schedule
        assert found.last_run_id == kept
    await owner.close()
