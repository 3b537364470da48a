"""Who asks and on whose behalf: tokens, and the context that travels with every call. Decides nothing about methods."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

import jwt
import uuid_utils
from mainspring.v1 import identity_pb2

from mainspring_kit.errors import MainspringError, Reason

AUDIENCE: Final = "mainspring"
USER_ISSUER: Final = "mainspring"
SERVICE_ISSUER: Final = "mainspring-service"
DEPTH_MAX: Final = 10
CONTEXT_KEY: Final = "mainspring-context-bin"
ROLE_NAMES: Final = ("viewer", "runner", "operator", "admin")

_TENANT_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_USER_PATTERN: Final = re.compile(r"[^\s\x00-\x1f\x7f][^\x00-\x1f\x7f]{0,127}")
_PLACEHOLDERS: Final = frozenset(
    {"default", "test", "none", "null", "undefined", "0", "unknown", "anonymous", "user", "placeholder", "example"}
)
_TEXTS: Final = ("tenant_id", "user_id", "session_id", "run_id", "request_id", "parent_request_id", "trace_id")
_SERVICE_TOKEN_SECONDS: Final = 3_600
_CACHED_TOKENS_MAX: Final = 10_000


def new_id() -> str:
    """A UUIDv7 as text: unique and ordered by time."""
    return str(uuid_utils.uuid7())


@dataclass(frozen=True, slots=True)
class UserExecutionContext:
    """Who asks, on whose behalf, as part of what. Elsewhere `session_id` is called thread."""

    tenant_id: str
    user_id: str
    session_id: str = ""
    run_id: str = ""
    request_id: str = ""
    parent_request_id: str = ""
    depth: int = 0
    roles: tuple[str, ...] = ()
    trace_id: str = ""
    deadline: datetime | None = None

    def __post_init__(self) -> None:
        _check_identity("tenant_id", self.tenant_id, pattern=_TENANT_PATTERN)
        _check_identity("user_id", self.user_id, pattern=_USER_PATTERN)
        for field in ("session_id", "run_id", "request_id"):
            value = getattr(self, field)
            if value and (value.strip().lower() in _PLACEHOLDERS or not _USER_PATTERN.fullmatch(value)):
                raise _refused(field, value)
        if not 0 <= self.depth <= DEPTH_MAX:
            raise MainspringError(
                Reason.CONTEXT_INVALID,
                f"A request may be at most {DEPTH_MAX} deep, this one is {self.depth}: start a run of its own instead.",
                field="depth",
                value=self.depth,
            )

    @property
    def thread_id(self) -> str:
        """The session, by the name that others use."""
        return self.session_id

    def child(self) -> UserExecutionContext:
        """The context of a request that this one causes: same tenant, user, session and run, one deeper."""
        return replace(self, request_id=new_id(), parent_request_id=self.request_id, depth=self.depth + 1)

    def to_message(self) -> identity_pb2.UserExecutionContext:
        """The context as it travels."""
        texts = {name: getattr(self, name) for name in _TEXTS}
        message = identity_pb2.UserExecutionContext(depth=self.depth, roles=self.roles, **texts)
        if self.deadline is not None:
            message.deadline.FromDatetime(self.deadline)
        return message

    @classmethod
    def from_message(cls, message: identity_pb2.UserExecutionContext) -> UserExecutionContext:
        """Checks and takes over a context that arrived; CONTEXT_INVALID when it is blank or a placeholder."""
        try:
            deadline = message.deadline.ToDatetime(UTC) if message.HasField("deadline") else None
        except (ValueError, OverflowError) as error:
            raise _refused("deadline", str(message.deadline.seconds)) from error
        texts = {name: getattr(message, name) for name in _TEXTS}
        texts["request_id"] = texts["request_id"] or new_id()
        return cls(depth=message.depth, roles=tuple(message.roles), deadline=deadline, **texts)


def _check_identity(field: str, value: str, *, pattern: re.Pattern[str]) -> None:
    if not pattern.fullmatch(value) or value.strip().lower() in _PLACEHOLDERS:
        raise _refused(field, value)


def _refused(field: str, value: str) -> MainspringError:
    return MainspringError(
        Reason.CONTEXT_INVALID,
        f"{field} {value[:64]!r} is blank, malformed or a placeholder: send a real identity.",
        field=field,
        value=value[:64],
    )


@dataclass(frozen=True, slots=True)
class Principal:
    """The holder of a verified token. `tenant_id` and `user_id` are empty for a service, whose name is `subject`."""

    subject: str
    tenant_id: str
    user_id: str
    roles: tuple[str, ...]
    is_service: bool
    expire_time: float

    def expired(self) -> MainspringError:
        """What a call ends with when its token runs out."""
        return _token_invalid("it has expired")

    def covers(self, role: int) -> bool:
        """Whether the principal has at least this `identity_pb2.Role`; only services have ROLE_SERVICE."""
        if self.is_service:
            return True
        if role in (identity_pb2.ROLE_UNSPECIFIED, identity_pb2.ROLE_SERVICE):
            return False
        return any(ROLE_NAMES.index(name) + 1 >= role for name in self.roles if name in ROLE_NAMES)


class TokenVerifier:
    """Verifies bearer tokens; remembers those it has verified until they expire."""

    def __init__(self, auth_secret: str, service_secret: str) -> None:
        self._secrets = {USER_ISSUER: auth_secret, SERVICE_ISSUER: service_secret}
        self._verified: OrderedDict[str, Principal] = OrderedDict()

    def verify(self, token: str) -> Principal:
        """The token's principal; TOKEN_INVALID when it is malformed, expired, for others or wrongly signed."""
        principal = self._verified.get(token)
        if principal is None:
            principal = self._decode(token)
            self._verified[token] = principal
            if len(self._verified) > _CACHED_TOKENS_MAX:
                self._verified.popitem(last=False)
        if principal.expire_time <= time.time():
            self._verified.pop(token, None)
            raise principal.expired()
        return principal

    def _decode(self, token: str) -> Principal:
        try:
            issuer = jwt.decode(token, options={"verify_signature": False}).get("iss")
            secret = self._secrets.get(issuer) if isinstance(issuer, str) else None
            if secret is None:
                raise _token_invalid("its issuer is not known here")
            claims = jwt.decode(
                token,
                secret,
                algorithms=["HS256"],
                audience=AUDIENCE,
                issuer=issuer,
                options={"require": ["iss", "aud", "sub", "tenant", "roles", "iat", "exp", "jti"]},
            )
        except (jwt.PyJWTError, UnicodeError) as error:
            raise _token_invalid(str(error)) from error
        return _principal(claims, is_service=issuer == SERVICE_ISSUER)


def _principal(claims: dict[str, object], *, is_service: bool) -> Principal:
    subject, tenant_id, roles, expires = claims["sub"], claims["tenant"], claims["roles"], claims["exp"]
    if not isinstance(subject, str) or not isinstance(tenant_id, str) or not isinstance(expires, int | float):
        raise _token_invalid("sub, tenant or exp has the wrong type")
    if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
        raise _token_invalid("roles is not a list of names")
    if is_service:
        if roles != ["service"]:
            raise _token_invalid("a service token has exactly the role service")
        return Principal(subject, "", "", ("service",), True, float(expires))
    if not set(roles) & set(ROLE_NAMES) or not set(roles) <= set(ROLE_NAMES):
        raise _token_invalid(f"roles must be some of {', '.join(ROLE_NAMES)}")
    UserExecutionContext(tenant_id=tenant_id, user_id=subject)
    return Principal(subject, tenant_id, subject, tuple(roles), False, float(expires))


def _token_invalid(detail: str) -> MainspringError:
    return MainspringError(
        Reason.TOKEN_INVALID, f"The bearer token is not valid: {detail}. Get a new token.", detail=detail
    )


class ServiceTokens:
    """Makes this process's own service token and renews it before it expires."""

    def __init__(self, service_secret: str, name: str) -> None:
        self._secret = service_secret
        self._name = name
        self._token = ""
        self._renew_time = 0.0

    def bearer(self) -> str:
        """The value of the `authorization` metadata."""
        if time.time() >= self._renew_time:
            now = int(time.time())
            claims: dict[str, object] = {
                "iss": SERVICE_ISSUER,
                "aud": AUDIENCE,
                "sub": self._name,
                "tenant": "",
                "roles": ["service"],
            }
            claims |= {"iat": now, "exp": now + _SERVICE_TOKEN_SECONDS, "jti": new_id()}
            self._token = f"Bearer {jwt.encode(claims, self._secret, algorithm='HS256')}"
            self._renew_time = now + _SERVICE_TOKEN_SECONDS / 2
        return self._token


@dataclass(frozen=True, slots=True)
class Caller:
    """What an interceptor has found out about the call under way."""

    principal: Principal
    context: UserExecutionContext | None


caller_variable: Final[ContextVar[Caller]] = ContextVar("mainspring_caller")


def current_principal() -> Principal:
    """The principal of the call under way."""
    return caller_variable.get().principal


def current_context() -> UserExecutionContext:
    """On whose behalf the call under way is made; CONTEXT_INVALID when a service named nobody."""
    context = caller_variable.get().context
    if context is None:
        raise MainspringError(
            Reason.CONTEXT_INVALID,
            f"A service must say for whom it calls: send a UserExecutionContext in the metadata {CONTEXT_KEY}.",
            field="context",
            value="",
        )
    return context
