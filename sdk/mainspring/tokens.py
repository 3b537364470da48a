"""Bearer tokens signed with a shared secret: for development, tests and operators who hold the secret."""

from __future__ import annotations

import base64
import hmac
import time
import uuid
from collections.abc import Sequence

ROLES = ("viewer", "runner", "operator", "admin")


def user_token(secret: str, *, tenant: str, user: str, roles: Sequence[str], ttl_seconds: int) -> str:
    """A token of a user; `secret` is the platform's MAINSPRING_AUTH_SECRET."""
    return _sign(secret, issuer="mainspring", subject=user, tenant=tenant, roles=roles, ttl_seconds=ttl_seconds)


def service_token(secret: str, *, name: str, ttl_seconds: int) -> str:
    """A token of one of the platform's own processes; `secret` is the platform's MAINSPRING_SERVICE_SECRET."""
    return _sign(
        secret, issuer="mainspring-service", subject=name, tenant="", roles=("service",), ttl_seconds=ttl_seconds
    )


def webhook_key(secret: str, *, tenant: str) -> str:
    """What receivers check webhooks of a tenant with, as their libraries take it: `whsec_` and base64.

    Derived from the platform's MAINSPRING_SERVICE_SECRET, which state signs with.
    """
    key = hmac.digest(secret.encode(), b"mainspring webhook key of tenant " + tenant.encode(), "sha256")
    return "whsec_" + base64.b64encode(key).decode()


def _sign(secret: str, *, issuer: str, subject: str, tenant: str, roles: Sequence[str], ttl_seconds: int) -> str:
    import jwt  # of the extra `platform`: who only talks to a platform needs no signing

    now = int(time.time())
    claims = {
        "iss": issuer,
        "aud": "mainspring",
        "sub": subject,
        "tenant": tenant,
        "roles": list(roles),
        "iat": now,
        "exp": now + ttl_seconds,
        "jti": uuid.uuid4().hex,
    }
    return jwt.encode(claims, secret, algorithm="HS256")
