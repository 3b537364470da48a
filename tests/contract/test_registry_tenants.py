"""Tenants and their limits over the wire: put, read, listed, deleted, watched; each tenant's own only."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from mainspring.v1 import registry_pb2 as pb

from test_framework.grpc_testing import error_of, violations_of
from test_framework.identities import Identities, make_context, unique
from tests.contract.registry_calls import TIMEOUT

pytestmark = pytest.mark.contract
grpc_service = "Registry"

# Any in this module: generated stubs have no common base.

LIMITS = pb.TenantLimits(max_concurrent=7, max_concurrent_per_user=2, weight=3, backlog_max=11)


def test_an_admin_puts_reads_replaces_and_deletes_the_own_tenant(grpc_stub: Any, identities: Identities) -> None:
    tenant_id = unique("tenant")
    metadata = identities.metadata(tenant_id, "ann", "admin")
    stored = grpc_stub.PutTenant(pb.PutTenantRequest(limits=LIMITS), metadata=metadata, timeout=TIMEOUT).tenant
    assert (stored.tenant_id, stored.limits) == (tenant_id, LIMITS)
    assert stored.HasField("update_time")
    assert grpc_stub.GetTenant(pb.GetTenantRequest(), metadata=metadata, timeout=TIMEOUT).tenant == stored
    narrow = pb.TenantLimits(max_concurrent=1)
    request = pb.PutTenantRequest(tenant_id=tenant_id, limits=narrow)
    assert grpc_stub.PutTenant(request, metadata=metadata, timeout=TIMEOUT).tenant.limits == narrow
    listed = grpc_stub.ListTenants(pb.ListTenantsRequest(), metadata=metadata, timeout=TIMEOUT)
    assert [each.limits for each in listed.tenants] == [narrow]
    grpc_stub.DeleteTenant(pb.DeleteTenantRequest(), metadata=metadata, timeout=TIMEOUT)
    for call, gone in (
        (grpc_stub.GetTenant, pb.GetTenantRequest()),
        (grpc_stub.DeleteTenant, pb.DeleteTenantRequest()),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            call(gone, metadata=metadata, timeout=TIMEOUT)
        assert error_of(raised.value).reason == "TENANT_NOT_FOUND"
    assert not grpc_stub.ListTenants(pb.ListTenantsRequest(), metadata=metadata, timeout=TIMEOUT).tenants


@pytest.mark.parametrize("method", ["Put", "Get", "Delete"])
def test_a_foreign_tenant_is_not_found_whether_or_not_it_exists(
    grpc_stub: Any, identities: Identities, method: str
) -> None:
    metadata, foreign = identities.metadata(unique("tenant"), "ann", "admin"), unique("tenant")
    call, request = getattr(grpc_stub, f"{method}Tenant"), getattr(pb, f"{method}TenantRequest")(tenant_id=foreign)
    for _ in range(2):
        with pytest.raises(grpc.RpcError) as raised:
            call(request, metadata=metadata, timeout=TIMEOUT)
        assert (raised.value.code(), error_of(raised.value).reason) == (
            grpc.StatusCode.NOT_FOUND,
            "TENANT_NOT_FOUND",
        )
        put = pb.PutTenantRequest(tenant_id=foreign, limits=LIMITS)
        grpc_stub.PutTenant(put, metadata=identities.service_metadata(), timeout=TIMEOUT)
    metadata = identities.metadata(foreign, "bob", "operator")
    assert grpc_stub.GetTenant(pb.GetTenantRequest(), metadata=metadata, timeout=TIMEOUT).tenant.limits == LIMITS


def test_a_service_lists_all_tenants_in_pages_and_on_behalf_of_a_user_that_ones(
    grpc_stub: Any, identities: Identities
) -> None:
    made = sorted(unique("tenant") for _ in range(5))
    for tenant_id in made:
        request = pb.PutTenantRequest(tenant_id=tenant_id, limits=LIMITS)
        grpc_stub.PutTenant(request, metadata=identities.service_metadata(), timeout=TIMEOUT)
    found, token = [], ""
    while True:
        page = grpc_stub.ListTenants(
            pb.ListTenantsRequest(page_size=2, page_token=token),
            metadata=identities.service_metadata(),
            timeout=TIMEOUT,
        )
        assert len(page.tenants) <= 2
        found += [each.tenant_id for each in page.tenants]
        token = page.next_page_token
        if not token:
            break
    assert found == sorted(found)
    assert set(made) <= set(found)
    own = identities.service_metadata(make_context(made[0]))
    listed = grpc_stub.ListTenants(pb.ListTenantsRequest(), metadata=own, timeout=TIMEOUT)
    assert [each.tenant_id for each in listed.tenants] == made[:1]


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        (pb.TenantLimits(max_concurrent=-1), "limits.max_concurrent"),
        (pb.TenantLimits(max_concurrent_per_user=1_000_001), "limits.max_concurrent_per_user"),
        (pb.TenantLimits(weight=1_001), "limits.weight"),
        (pb.TenantLimits(backlog_max=-5), "limits.backlog_max"),
    ],
)
def test_limits_out_of_bounds_are_refused(
    grpc_stub: Any, identities: Identities, limits: pb.TenantLimits, field: str
) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        grpc_stub.PutTenant(
            pb.PutTenantRequest(limits=limits),
            metadata=identities.metadata(unique("tenant"), "ann", "admin"),
            timeout=TIMEOUT,
        )
    assert field in violations_of(raised.value)


async def test_watchers_hear_of_limits_and_of_their_end(aio_stub: Any, identities: Identities) -> None:
    tenant_id = unique("tenant")
    metadata = identities.metadata(tenant_id, "ann", "admin")
    await aio_stub.PutTenant(pb.PutTenantRequest(limits=LIMITS), metadata=metadata, timeout=TIMEOUT)
    call = aio_stub.WatchCatalog(pb.WatchCatalogRequest(), metadata=identities.service_metadata(), timeout=60)

    async def heard() -> pb.CatalogTenant:
        async with asyncio.timeout(TIMEOUT):
            while True:
                frame: pb.WatchCatalogResponse = await call.read()
                for entry in frame.tenants:
                    if entry.tenant.tenant_id == tenant_id:
                        return entry

    entry = await heard()
    assert (entry.tenant.limits, entry.deleted) == (LIMITS, False)
    await aio_stub.PutTenant(pb.PutTenantRequest(), metadata=metadata, timeout=TIMEOUT)
    entry = await heard()
    assert (entry.tenant.limits, entry.deleted) == (pb.TenantLimits(), False)
    await aio_stub.DeleteTenant(pb.DeleteTenantRequest(), metadata=metadata, timeout=TIMEOUT)
    assert (await heard()).deleted
    call.cancel()
