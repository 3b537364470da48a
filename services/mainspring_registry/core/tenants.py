"""Which tenant a call is about, and whether the caller may know of it."""

from __future__ import annotations

from mainspring_kit.errors import MainspringError, Reason
from mainspring_kit.identity import Caller, UserExecutionContext


def read_tenant(caller: Caller, asked: str) -> UserExecutionContext:
    """As whom to read and write the tenant: a service may name any, others only their own. TENANT_NOT_FOUND."""
    own = caller.context
    if not caller.principal.is_service and own is not None and asked not in ("", own.tenant_id):
        raise tenant_not_found(asked)
    if own is not None and asked in ("", own.tenant_id):
        return own
    return UserExecutionContext(tenant_id=asked, user_id=caller.principal.subject)


def tenant_not_found(tenant_id: str) -> MainspringError:
    """TENANT_NOT_FOUND for this tenant."""
    return MainspringError(
        Reason.TENANT_NOT_FOUND,
        f"There are no limits of a tenant {tenant_id[:64]!r} that you may see: put them first.",
        tenant_id=tenant_id[:64],
    )
