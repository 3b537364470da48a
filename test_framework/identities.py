"""Who calls in a test: contexts with real identities, and the metadata that proves them."""

from __future__ import annotations

import secrets

from mainspring.tokens import user_token
from mainspring_kit.identity import (
    CONTEXT_KEY,
    ServiceTokens,
    UserExecutionContext,
    new_id,
)

__all__ = ["Identities", "UserExecutionContext", "make_context", "unique"]

TOKEN_SECONDS = 3_600

Metadata = tuple[tuple[str, str | bytes], ...]


def unique(prefix: str) -> str:
    """A name that no other test has."""
    return f"{prefix}-{secrets.token_hex(5)}"


def make_context(tenant_id: str = "", user_id: str = "", session_id: str = "") -> UserExecutionContext:
    """A context of a test's own: user, session (thread), run and request are new unless given."""
    return UserExecutionContext(
        tenant_id=tenant_id or unique("tenant"),
        user_id=user_id or unique("person"),
        session_id=session_id or unique("session"),
        run_id=new_id(),
        request_id=new_id(),
        roles=("runner",),
        trace_id=secrets.token_hex(16),
    )


class Identities:
    """Makes tokens with the secrets of the platform under test, and the metadata of calls with them."""

    def __init__(self, auth_secret: str, service_secret: str) -> None:
        self.auth_secret = auth_secret
        self.service_secret = service_secret
        self._services = ServiceTokens(service_secret, "test-service")

    def token(self, tenant_id: str, user_id: str, role: str = "runner", *, ttl_seconds: int = TOKEN_SECONDS) -> str:
        """A user's token; a negative `ttl_seconds` makes one that has expired."""
        return user_token(self.auth_secret, tenant=tenant_id, user=user_id, roles=(role,), ttl_seconds=ttl_seconds)

    def metadata(self, tenant_id: str, user_id: str, role: str = "runner") -> Metadata:
        """The metadata of a user's call."""
        return (("authorization", f"Bearer {self.token(tenant_id, user_id, role)}"),)

    def service_metadata(self, context: UserExecutionContext | None = None) -> Metadata:
        """The metadata of a call by one of the platform's own processes, on behalf of `context` where given."""
        bearer: Metadata = (("authorization", self._services.bearer()),)
        if context is None:
            return bearer
        return (*bearer, (CONTEXT_KEY, context.to_message().SerializeToString()))
