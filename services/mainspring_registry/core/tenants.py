"""Which tenant a call is about, and whether the caller may know of it."""

from __future__ import annotations

from mainspring_kit.errors import MainspringError, Reason


def read_tenant_id(asked: str, *, own: str, is_service: bool) -> str:
    """The tenant's id: `own` where none is asked for; a service may ask for any. TENANT_NOT_FOUND."""
    if not is_service and asked not in ("", own):
        raise tenant_not_found(asked)
    return asked or own


def tenant_not_found(tenant_id: str) -> MainspringError:
    """TENANT_NOT_FOUND for this tenant."""
    return MainspringError(
        Reason.TENANT_NOT_FOUND,
        f"There are no limits of a tenant {tenant_id[:64]!r} that you may see: put them first.",
        tenant_id=tenant_id[:64],
    )
