"""Tokens are verified, contexts are checked, children keep what they must."""

import time

import jwt
import pytest
from mainspring.tokens import user_token
from mainspring_kit.errors import MainspringError
from mainspring_kit.identity import ServiceTokens, TokenVerifier, UserExecutionContext, new_id

pytestmark = pytest.mark.unit

AUTH, SERVICE = "a" * 40, "s" * 40


def claims(**changes: object) -> dict[str, object]:
    now = int(time.time())
    base: dict[str, object] = {
        "iss": "mainspring",
        "aud": "mainspring",
        "sub": "ada",
        "tenant": "acme",
        "roles": ["runner"],
        "iat": now,
        "exp": now + 60,
        "jti": new_id(),
    }
    return {key: value for key, value in (base | changes).items() if value is not None}


def test_a_users_token_tells_tenant_user_and_roles() -> None:
    token = user_token(AUTH, tenant="acme", user="ada", roles=("runner",), ttl_seconds=60)
    principal = TokenVerifier(AUTH, SERVICE).verify(token)
    assert (principal.tenant_id, principal.user_id, principal.roles) == ("acme", "ada", ("runner",))
    assert [principal.covers(role) for role in (0, 1, 2, 3, 4, 5)] == [False, True, True, False, False, False]


def test_a_service_token_covers_everything_and_is_signed_with_its_own_key() -> None:
    token = ServiceTokens(SERVICE, "gateway").bearer().removeprefix("Bearer ")
    assert TokenVerifier(AUTH, SERVICE).verify(token).is_service
    with pytest.raises(MainspringError, match="TOKEN_INVALID"):
        TokenVerifier(AUTH, "t" * 40).verify(token)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"exp": 1}, AUTH),
        ({"aud": "others"}, AUTH),
        ({"iss": "somebody"}, AUTH),
        ({"jti": None}, AUTH),
        ({"tenant": None}, AUTH),
        ({"roles": "runner"}, AUTH),
        ({"roles": ["service"]}, AUTH),
        ({"roles": ["root"]}, AUTH),
        ({"roles": []}, AUTH),
        ({"sub": 5}, AUTH),
        ({}, "w" * 40),
        ({"iss": "mainspring-service", "roles": ["service"]}, AUTH),
    ],
)
def test_a_wrong_token_is_refused(changes: dict[str, object], key: str) -> None:
    token = jwt.encode(claims(**changes), key, algorithm="HS256")
    with pytest.raises(MainspringError, match="TOKEN_INVALID"):
        TokenVerifier(AUTH, SERVICE).verify(token)


def test_an_unsigned_token_is_refused() -> None:
    with pytest.raises(MainspringError, match="TOKEN_INVALID"):
        TokenVerifier(AUTH, SERVICE).verify(jwt.encode(claims(), "", algorithm="none"))


def test_a_remembered_token_still_expires() -> None:
    verifier = TokenVerifier(AUTH, SERVICE)
    token = user_token(AUTH, tenant="acme", user="ada", roles=("viewer",), ttl_seconds=60)
    principal = verifier.verify(token)
    verifier._verified[token] = type(principal)("ada", "acme", "ada", ("viewer",), False, time.time() - 1)
    with pytest.raises(MainspringError, match="expired"):
        verifier.verify(token)


@pytest.mark.parametrize("value", ["", " ", "default", "test", "None", "0", "x" * 200, "two\nlines", " ada"])
def test_blank_and_placeholder_identities_are_refused(value: str) -> None:
    with pytest.raises(MainspringError, match="CONTEXT_INVALID"):
        UserExecutionContext(tenant_id="acme", user_id=value)


def test_a_child_keeps_the_identity_and_stops_at_depth_ten() -> None:
    context = UserExecutionContext(tenant_id="acme", user_id="ada", session_id="s", run_id="r", request_id=new_id())
    child = context.child()
    assert (child.tenant_id, child.user_id, child.session_id, child.run_id) == ("acme", "ada", "s", "r")
    assert child.parent_request_id == context.request_id != child.request_id
    for _ in range(9):
        child = child.child()
    with pytest.raises(MainspringError, match="deep"):
        child.child()


def test_a_deadline_beyond_all_calendars_is_refused() -> None:
    message = UserExecutionContext(tenant_id="acme", user_id="ada").to_message()
    message.deadline.seconds = 10**17
    with pytest.raises(MainspringError, match="CONTEXT_INVALID"):
        UserExecutionContext.from_message(message)


def test_a_context_survives_the_wire() -> None:
    context = UserExecutionContext(tenant_id="acme", user_id="ada", request_id=new_id(), roles=("admin",), depth=3)
    assert UserExecutionContext.from_message(context.to_message()) == context
