"""Who may call what, for every rpc of every service: tokens, roles, contexts, and what this release does not serve."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc
import jwt
import pytest
from google.protobuf.message import Message
from mainspring_kit.identity import CONTEXT_KEY, new_id

from test_framework.grpc_testing import error_of
from test_framework.identities import Identities, Metadata, make_context
from tests.contract.matrix_calls import BUILT, RPCS, UNARY, UNBUILT, Rpc, Wire, World, too_low_a_role

pytestmark = [pytest.mark.contract, pytest.mark.security, pytest.mark.real_services]

Claims = dict[str, Any]  # Any: JSON
HELD_SECONDS = 20.0
STRANGERS_SECRET = "a-secret-that-no-part-of-the-platform-knows"


def bearer(token: str) -> Metadata:
    """The metadata of a call with this token."""
    return (("authorization", f"Bearer {token}"),)


def claims(**changes: Any) -> Claims:
    """The claims of a good admin's token, but for the changes; None leaves a claim out. Any: JSON."""
    now = int(time.time())
    good: Claims = {
        "iss": "mainspring",
        "aud": "mainspring",
        "sub": "ann",
        "tenant": "acme",
        "roles": ["admin"],
        "iat": now,
        "exp": now + 60,
        "jti": new_id(),
    }
    return {name: value for name, value in (good | changes).items() if value is not None}


def signed(changes: Mapping[str, Any], *, by: Callable[[Identities], str] | str = "") -> Callable[[Identities], str]:
    """Makes a token; `by`: the secret, else the platform's own for users."""

    def sign(identities: Identities) -> str:
        secret = by if isinstance(by, str) else by(identities)
        return jwt.encode(claims(**changes), secret or identities.auth_secret, algorithm="HS256")

    return sign


SERVICE = {"iss": "mainspring-service", "sub": "state", "tenant": "", "roles": ["service"]}

# A token, the reason, and the part of the message that says what is wrong with it.
BAD_TOKENS: Mapping[str, tuple[Callable[[Identities], str], str]] = {
    "malformed": (lambda _: "not.a.token", "TOKEN_INVALID"),
    "no part of a token": (lambda _: "{}", "TOKEN_INVALID"),
    "endless": (lambda _: "a" * 6_000, "TOKEN_INVALID"),
    "wrong audience": (signed({"aud": "elsewhere"}), "TOKEN_INVALID"),
    "wrong issuer": (signed({"iss": "elsewhere"}), "TOKEN_INVALID"),
    "no issuer": (signed({"iss": None}), "TOKEN_INVALID"),
    "a stranger's signature": (signed({}, by=STRANGERS_SECRET), "TOKEN_INVALID"),
    "signed as a service": (signed({}, by=lambda identities: identities.service_secret), "TOKEN_INVALID"),
    "a user who says to be a service": (signed(SERVICE), "TOKEN_INVALID"),
    "not signed": (lambda _: jwt.encode(claims(), None, algorithm="none"), "TOKEN_INVALID"),
    "expired": (signed({"exp": int(time.time()) - 1}), "TOKEN_INVALID"),
    "not yet issued": (signed({"iat": int(time.time()) + 3_600}), "TOKEN_INVALID"),
    "never expires": (signed({"exp": None}), "TOKEN_INVALID"),
    "no tenant": (signed({"tenant": None}), "TOKEN_INVALID"),
    "an unknown role": (signed({"roles": ["king"]}), "TOKEN_INVALID"),
    "a service's role in a user's token": (signed({"roles": ["service"]}), "TOKEN_INVALID"),
    "no role": (signed({"roles": []}), "TOKEN_INVALID"),
    "a tenant that is no text": (signed({"tenant": 7}), "TOKEN_INVALID"),
    "a blank tenant": (signed({"tenant": " "}), "CONTEXT_INVALID"),
    "a placeholder for a tenant": (signed({"tenant": "default"}), "CONTEXT_INVALID"),
    "a placeholder for a user": (signed({"sub": "Anonymous"}), "CONTEXT_INVALID"),
    "an empty user": (signed({"sub": ""}), "CONTEXT_INVALID"),
}


def held(request: Message, over: threading.Event) -> Iterator[Message]:
    """A request, and then nothing more, but no end either."""
    yield request
    over.wait(HELD_SECONDS)


def refusal(wire: Wire, rpc: Rpc, metadata: Metadata) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """What an empty request is refused with; the error must be wholly ours."""
    with pytest.raises(grpc.RpcError) as raised:
        wire.answer(rpc, rpc.request_class(), metadata)
    return error_of(raised.value)


def test_the_matrix_knows_every_service_of_the_stack(wire: Wire) -> None:
    assert {rpc.service.lower() for rpc in RPCS} == set(wire.stack.services)
    assert len(BUILT) + len(UNBUILT) == len(RPCS) and BUILT and UNBUILT


@pytest.mark.parametrize("rpc", RPCS, ids=str)
def test_nobody_is_served_without_a_token(wire: Wire, rpc: Rpc) -> None:
    schemes: list[Metadata] = [(), (("authorization", ""),), (("authorization", "Basic YTpi"),)]
    for metadata in [*schemes, (("authorization", "Bearer "),)]:
        assert refusal(wire, rpc, metadata) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING", {})


@pytest.mark.parametrize("rpc", RPCS, ids=str)
def test_no_bad_token_is_taken(wire: Wire, rpc: Rpc) -> None:
    codes = {"TOKEN_INVALID": grpc.StatusCode.UNAUTHENTICATED, "CONTEXT_INVALID": grpc.StatusCode.INVALID_ARGUMENT}
    keys = {"TOKEN_INVALID": {"detail"}, "CONTEXT_INVALID": {"field", "value"}}
    for name, (make, reason) in BAD_TOKENS.items():
        code, told, metadata = refusal(wire, rpc, bearer(make(wire.identities)))
        assert (code, told, set(metadata)) == (codes[reason], reason, keys[reason]), name


@pytest.mark.parametrize("rpc", [rpc for rpc in RPCS if too_low_a_role(rpc)], ids=str)
def test_a_role_below_the_least_is_refused(wire: Wire, rpc: Rpc) -> None:
    metadata = wire.identities.metadata("acme", "ann", too_low_a_role(rpc))
    named = {"method": rpc.path, "role": rpc.role}
    assert refusal(wire, rpc, metadata) == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED", named)


@pytest.mark.parametrize("rpc", UNBUILT, ids=str)
def test_what_is_not_built_says_so_to_whoever_may_call_it(wire: Wire, rpc: Rpc) -> None:
    for metadata in (wire.metadata(rpc, make_context()), wire.identities.service_metadata(make_context())):
        code, reason, named = refusal(wire, rpc, metadata)
        assert (code, reason, named) == (grpc.StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED", {"method": rpc.path})


@pytest.mark.parametrize("rpc", BUILT, ids=str)
def test_the_least_role_is_enough_for_a_right_request(world: World, rpc: Rpc) -> None:
    assert world.wire.fault(rpc, world.request(rpc), world.metadata(rpc)) is None


@pytest.mark.parametrize("rpc", BUILT, ids=str)
def test_no_context_with_a_blank_or_placeholder_identity_is_taken(world: World, rpc: Rpc) -> None:
    bad = [{"tenant_id": ""}, {"tenant_id": "default"}, {"user_id": "  "}, {"user_id": "null"}, {"user_id": "a\x00b"}]
    bad += [{"run_id": "placeholder"}, {"session_id": "None"}, {"request_id": "unknown"}, {"tenant_id": "t" * 65}]
    for changes in bad:
        context = make_context().to_message()
        for field, value in changes.items():
            setattr(context, field, value)
        metadata = (*world.wire.identities.service_metadata(), (CONTEXT_KEY, context.SerializeToString()))
        code, reason, _ = refusal(world.wire, rpc, metadata)
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_INVALID"), changes
    deep = make_context().to_message()
    deep.depth = 11
    for sent in (deep.SerializeToString(), b"\xff\xff not a message"):
        metadata = (*world.wire.identities.service_metadata(), (CONTEXT_KEY, sent))
        assert refusal(world.wire, rpc, metadata)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_INVALID")


# Tools without a tenant are everybody's, calls are cancelled by the tenant that the request names, and a service may
# read every tenant's limits.
@pytest.mark.parametrize(
    "rpc", [rpc for rpc in UNARY if rpc.name not in ("RegisterTools", "CancelCalls", "ListTenants")], ids=str
)
def test_a_service_must_say_for_whom_it_calls(world: World, rpc: Rpc) -> None:
    request = world.request(rpc)
    with pytest.raises(grpc.RpcError) as raised:
        world.wire.answer(rpc, request, world.wire.identities.service_metadata())
    assert error_of(raised.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_INVALID")
    assert world.wire.fault(rpc, world.request(rpc), world.on_behalf()) is None


@pytest.mark.parametrize("rpc", BUILT, ids=str)
def test_a_user_speaks_for_nobody_else(world: World, rpc: Rpc) -> None:
    """A context that a user sends is not looked at: the token says who calls."""
    if rpc.role == "service":
        return
    foreign = (CONTEXT_KEY, make_context().to_message().SerializeToString())
    assert world.wire.fault(rpc, world.request(rpc), (*world.metadata(rpc), foreign)) is None


def test_a_users_stream_ends_with_its_token_and_a_services_goes_on(world: World) -> None:
    """A user who goes on opens another with a new token; all of them at once, for they have to be waited for."""
    streams = [rpc for rpc in BUILT if rpc.is_stream]
    exp = int(time.time()) + 3
    opened, over = {}, threading.Event()
    for rpc in streams:
        by_service = rpc.role == "service"
        subject = SERVICE if by_service else {"tenant": world.user.tenant_id, "sub": world.user.user_id}
        secret = world.wire.identities.service_secret if by_service else ""
        token = signed({**subject, "exp": exp}, by=secret)(world.wire.identities)
        request = world.request(rpc)
        requests = held(request, over) if rpc.method.client_streaming else [request]
        opened[rpc] = world.wire.open(rpc, requests, bearer(token))
    of_users = {rpc: call for rpc, call in opened.items() if rpc.role != "service"}
    for rpc, call in of_users.items():
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
        error = error_of(raised.value)
        assert error == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID", {"detail": "it has expired"}), rpc
    assert of_users
    assert time.time() > exp
    of_services = {rpc: call for rpc, call in opened.items() if rpc not in of_users}
    assert {rpc.name for rpc in of_services} >= {"Append", "CallTools", "StartRuns", "Heartbeat"}
    for rpc, call in of_services.items():
        assert call.is_active(), rpc
        call.cancel()
    over.set()
