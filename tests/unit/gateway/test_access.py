"""The gateway lets in users with their own credential, to what their role covers, from pages it knows."""

import pytest
from mainspring.tokens import user_token
from mainspring_gateway import access
from mainspring_kit.errors import MainspringError
from mainspring_kit.identity import ServiceTokens, TokenVerifier

pytestmark = pytest.mark.unit

AUTH, SERVICE = "a" * 40, "s" * 40
VERIFIER = TokenVerifier(AUTH, SERVICE)


def token(*roles: str) -> str:
    return user_token(AUTH, tenant="acme", user="ann", roles=roles, ttl_seconds=60)


def test_a_user_is_known_by_the_bearer() -> None:
    principal = access.authenticate(VERIFIER, {"Authorization": f"Bearer {token('viewer')}"})
    context = access.context_of(principal, session_id="s", run_id="r")
    assert (context.tenant_id, context.user_id, context.session_id, context.run_id) == ("acme", "ann", "s", "r")
    assert context.roles == ("viewer",)
    assert len(context.trace_id) == 32
    assert context.request_id != access.context_of(principal).request_id


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({}, "TOKEN_MISSING"),
        ({"Authorization": "Basic x"}, "TOKEN_MISSING"),
        ({"Authorization": "Bearer x"}, "TOKEN_INVALID"),
    ],
)
def test_nobody_else_is(headers: dict[str, str], reason: str) -> None:
    with pytest.raises(MainspringError, match=reason):
        access.authenticate(VERIFIER, headers)


def test_a_service_is_no_user() -> None:
    with pytest.raises(MainspringError, match="TOKEN_INVALID"):
        access.authenticate(VERIFIER, {"Authorization": ServiceTokens(SERVICE, "execution").bearer()})


@pytest.mark.parametrize(
    ("role", "allowed", "refused"),
    [
        ("viewer", access.FOLLOW, access.START_RUN),
        ("viewer", access.READ_EVENTS, access.CANCEL_RUN),
        ("runner", access.START_RUN, access.REGISTER_AGENT),
        ("operator", access.LIST_INSTANCES, None),
    ],
)
def test_a_role_covers_what_the_contract_says(role: str, allowed: object, refused: object) -> None:
    principal = VERIFIER.verify(token(role))
    access.authorize(principal, allowed)  # type: ignore[arg-type]  # a method's descriptor
    if refused is not None:
        with pytest.raises(MainspringError, match="ROLE_REQUIRED"):
            access.authorize(principal, refused)  # type: ignore[arg-type]  # a method's descriptor


@pytest.mark.parametrize(
    "origin", [None, "http://gateway:8080", "https://GATEWAY:8080", "https://app.example", "HTTPS://app.example"]
)
def test_known_pages_may_open_sockets(origin: str | None) -> None:
    access.check_origin(origin, host="gateway:8080", allowed=frozenset({"https://app.example"}))


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "", "http://gateway:9999", "https://app.example.evil.example", "http://[::1"],
)
def test_other_pages_may_not(origin: str) -> None:
    with pytest.raises(MainspringError, match="ORIGIN_REFUSED"):
        access.check_origin(origin, host="gateway:8080", allowed=frozenset({"https://app.example"}))


def test_any_page_may_where_the_operator_says_so() -> None:
    access.check_origin("http://evil.example", host="gateway:8080", allowed=frozenset({"*"}))
