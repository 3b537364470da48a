"""How every rpc that is built takes requests: foreign, empty, huge, unknown, late, abandoned and repeated ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import orjson
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from mainspring.v1 import execution_pb2, registry_pb2, state_pb2, types_pb2
from mainspring_kit.errors import from_rpc_error
from mainspring_kit.identity import new_id

from test_framework.agents import echo_agent
from test_framework.grpc_testing import error_of, violations_of
from test_framework.identities import UserExecutionContext, make_context, unique
from tests.contract.matrix_calls import BUILT, CALL_SECONDS, LARGE_BYTES, SILENT, UNARY, Rpc, Wire, World, rpc_named

pytestmark = [pytest.mark.contract, pytest.mark.real_services]

# A field of no message of ours: number 19,000 is never given out. Length-delimited, with the bytes "new".
UNKNOWN_FIELD = b"\xc2\xa3\x09\x03new"
TEXTS = ("x" * 1_000_000, "\x00", "a\x00b", "\u202e\uffff\U0010ffff", "'; DROP TABLE runs; --", "%_\\", "../..")
LOG_NAMES = ("registry", "dispatcher", "execution", "state")
# What a request may be refused with, whatever it says: nothing that is a fault of ours.
OURS = {"INTERNAL", "NOT_IMPLEMENTED", "PEER_UNAVAILABLE", "DEADLINE_EXCEEDED"}


@pytest.fixture(scope="module", autouse=True)
def _no_fault_of_ours(wire: Wire) -> Iterator[None]:
    """No service logs a fault while the module's requests are answered, whatever they were told."""

    def faults() -> dict[str, int]:
        return {name: wire.stack.log_text(name).count('"rpc_failed"') for name in LOG_NAMES}

    before = faults()
    yield
    assert faults() == before


def strings_of(message: Message, prefix: str = "") -> Iterator[tuple[str, Message, str]]:
    """Every text field of a request and of the messages that it holds: where it is, in which message, its name."""
    for field in message.DESCRIPTOR.fields:
        value: Any = getattr(message, field.name)  # Any: reflection
        if field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated:
            yield f"{prefix}{field.name}", message, field.name
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            held = value if field.is_repeated else [value] if message.HasField(field.name) else []
            for index, inner in enumerate(held):
                yield from strings_of(inner, f"{prefix}{field.name}[{index}].")


@pytest.mark.parametrize("rpc", BUILT, ids=str)
def test_an_empty_request_is_answered_or_refused_with_a_reason(world: World, rpc: Rpc) -> None:
    assert world.wire.reason(rpc, rpc.request_class(), world.metadata(rpc)) not in OURS


@pytest.mark.parametrize("rpc", BUILT, ids=str)
def test_bytes_that_are_no_message_are_refused(world: World, rpc: Rpc) -> None:
    kind: Any = {
        (False, False): world.wire.channel(rpc).unary_unary,
        (False, True): world.wire.channel(rpc).unary_stream,
        (True, True): world.wire.channel(rpc).stream_stream,
    }[rpc.method.client_streaming, rpc.method.server_streaming]
    sent: Any = b"\xff\xff\xff no message"
    if rpc.method.client_streaming:
        sent = iter([sent])
    with pytest.raises(grpc.RpcError) as raised:
        answer = kind(rpc.path)(sent, metadata=world.metadata(rpc), timeout=CALL_SECONDS)
        list(answer if rpc.is_stream else [])
    assert error_of(raised.value) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_INVALID", {"field": ""})
    assert world.wire.fault(rpc, world.request(rpc), world.metadata(rpc)) is None


@pytest.mark.parametrize("rpc", BUILT, ids=str)
def test_a_field_of_a_later_release_is_tolerated(world: World, rpc: Rpc) -> None:
    request = rpc.request_class.FromString(world.request(rpc).SerializeToString() + UNKNOWN_FIELD)
    assert request.SerializeToString().endswith(UNKNOWN_FIELD)
    assert world.wire.fault(rpc, request, world.metadata(rpc)) is None


@pytest.mark.parametrize("rpc", BUILT, ids=str)
def test_text_of_any_size_and_kind_is_answered_or_refused_with_a_reason(world: World, rpc: Rpc) -> None:
    for text in TEXTS:
        made = world.request(rpc)
        for where in [where for where, _, _ in strings_of(made)]:
            request = type(made).FromString(made.SerializeToString())
            _, holder, name = next(found for found in strings_of(request) if found[0] == where)
            setattr(holder, name, text)
            assert world.wire.reason(rpc, request, world.metadata(rpc)) not in OURS, (where, text[:8])


@pytest.mark.parametrize("rpc", [rpc for rpc in UNARY if "name" in rpc.method.input_type.fields_by_name], ids=str)
def test_a_request_that_breaks_a_rule_names_the_field(world: World, rpc: Rpc) -> None:
    request: Any = world.request(rpc)
    request.name = "x" * 101
    with pytest.raises(grpc.RpcError) as raised:
        world.wire.answer(rpc, request, world.metadata(rpc))
    error = error_of(raised.value)
    assert (error.code, error.reason, error.metadata) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "REQUEST_INVALID",
        {"field": "name"},
    )
    assert list(violations_of(raised.value)) == ["name"]


@pytest.mark.parametrize("rpc", BUILT, ids=str)
def test_an_over_size_message_is_refused_and_harms_nobody(world: World, rpc: Rpc) -> None:
    large = UNKNOWN_FIELD[:3] + _varint(LARGE_BYTES) + bytes(LARGE_BYTES)
    with pytest.raises(grpc.RpcError) as raised:
        world.wire.answers(rpc, [rpc.request_class.FromString(large)], world.metadata(rpc))
    fault = from_rpc_error(raised.value)
    assert (fault.code, fault.reason_name) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "PAYLOAD_TOO_LARGE")
    assert world.wire.fault(rpc, world.request(rpc), world.metadata(rpc)) is None


@pytest.mark.parametrize("rpc", BUILT, ids=str)
def test_a_call_out_of_time_ends_so(world: World, rpc: Rpc) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        list(world.wire.open(rpc, [world.request(rpc)], world.metadata(rpc), seconds=-1))
    fault = from_rpc_error(raised.value)
    assert (fault.code, fault.reason_name) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")


@pytest.mark.parametrize("rpc", BUILT, ids=str)
def test_a_cancelled_call_ends_so_and_the_next_is_served(world: World, rpc: Rpc) -> None:
    request, metadata = world.request(rpc), world.metadata(rpc)
    multi = getattr(world.wire.stub(rpc.service), rpc.name)
    if rpc.is_stream:
        sent: Any = iter([request]) if rpc.method.client_streaming else request
        call = multi(sent, metadata=metadata, timeout=CALL_SECONDS)
    else:
        call = multi.future(request, metadata=metadata, timeout=CALL_SECONDS)
    call.cancel()
    # An answer may have been faster than the cancel.
    assert call.code() in (grpc.StatusCode.CANCELLED, *([] if rpc.is_stream else [grpc.StatusCode.OK]))
    assert world.wire.fault(rpc, world.request(rpc), world.metadata(rpc)) is None


# What names something of the user's or the tenant's own.
OWN = {
    "GetAgent": "AGENT_NOT_FOUND",
    "ResolveAgent": "AGENT_NOT_FOUND",
    "ListVersions": "AGENT_NOT_FOUND",
    "StartRun": "AGENT_NOT_FOUND",
    "CancelRun": "RUN_NOT_FOUND",
    "PauseRun": "RUN_NOT_FOUND",
    "ResumeRun": "RUN_NOT_FOUND",
    "SignalRun": "RUN_NOT_FOUND",
    "RetryRun": "RUN_NOT_FOUND",
    "ForkRun": "RUN_NOT_FOUND",
    "ExplainRun": "RUN_NOT_FOUND",
    "ResolveApproval": "APPROVAL_NOT_FOUND",
    "GetApproval": "APPROVAL_NOT_FOUND",
    "GetSchedule": "SCHEDULE_NOT_FOUND",
    "DeleteSchedule": "SCHEDULE_NOT_FOUND",
    "GetTenant": "TENANT_NOT_FOUND",
    "DeleteTenant": "TENANT_NOT_FOUND",
    "PutInput": "RUN_NOT_FOUND",
    "GetRun": "RUN_NOT_FOUND",
    "WaitRun": "RUN_NOT_FOUND",
    "ReadEvents": "RUN_NOT_FOUND",
    "GetSession": "SESSION_NOT_FOUND",
}
# What lists or makes: a stranger gets answers about nothing but a stranger's own.
LISTS = {
    *("ListAgents", "ListTools", "ListRuns", "ListSessions", "ListApprovals", "ListRunMetrics", "ListSchedules"),
    *("ListTenants", "RegisterAgent", "RegisterTools", "CreateSession", "PutSchedule", "PutTenant"),
}
# What belongs to all of a tenant.
SHARED = ("AGENT_NOT_FOUND", "SCHEDULE_NOT_FOUND", "TENANT_NOT_FOUND")


def test_every_unary_rpc_is_held_against_strangers() -> None:
    """CancelCalls is for services, which name the tenant; a foreign call there is one that is not under way."""
    assert {rpc.name for rpc in UNARY} == {*OWN, *LISTS, "CancelCalls"}


@pytest.mark.parametrize("rpc", [rpc for rpc in UNARY if rpc.name in OWN], ids=str)
def test_what_is_somebody_elses_is_not_found(world: World, rpc: Rpc) -> None:
    reason = OWN[rpc.name]
    strangers = [make_context()]
    if reason not in SHARED:
        strangers.append(make_context(world.user.tenant_id, session_id=world.user.session_id))
    for stranger in strangers:
        for metadata in (world.wire.metadata(rpc, stranger), world.on_behalf(stranger)):
            with pytest.raises(grpc.RpcError) as raised:
                world.wire.answer(rpc, world.request(rpc), metadata)
            error = error_of(raised.value)
            assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, reason)
            assert all(owned not in str(error) for owned in (world.user.user_id, world.user.tenant_id))


@pytest.mark.parametrize("rpc", [rpc for rpc in UNARY if rpc.name.startswith("List")], ids=str)
def test_lists_show_a_stranger_nothing(world: World, rpc: Rpc) -> None:
    if rpc.name in OWN:
        return
    shown = {who.user_id: _listed(world, rpc, who) for who in (world.user, make_context())}
    own, foreign = shown.values()
    shared = [item for item in foreign if item in own]
    assert foreign == shared  # the shared tools are everybody's
    if rpc.name != "ListTools":
        assert own and foreign == []


def _listed(world: World, rpc: Rpc, user: UserExecutionContext) -> list[bytes]:
    page = world.wire.answer(rpc, world.request(rpc), world.wire.metadata(rpc, user))
    (items,) = [value for field, value in page.ListFields() if field.is_repeated] or [[]]
    return [item.SerializeToString(deterministic=True) for item in items]


def test_a_repeated_request_is_done_once(world: World) -> None:
    """What writes carries something by which a repeat is known; the second answer is the first."""
    put, cancel = rpc_named("PutInput"), rpc_named("CancelRun")
    asked = state_pb2.PutInputRequest(run_id=world.start(), request_id=new_id(), cancel=state_pb2.CancelInput())
    first = world.wire.answer(put, asked, world.metadata(put))
    asked.cancel.reason = "said otherwise"
    again = world.wire.answer(put, asked, world.metadata(put))
    assert again == first and not again.input.cancel.reason

    run_id = world.start()
    wish = execution_pb2.CancelRunRequest(run_id=run_id, request_id=new_id())
    for _ in range(2):
        assert world.wire.answer(cancel, wish, world.metadata(cancel)).run_id == run_id

    create = rpc_named("CreateSession")
    session = state_pb2.CreateSessionRequest(session_id=unique("session"), title="first")
    context = world.on_behalf()
    made = world.wire.answer(create, session, context)
    assert world.wire.answer(create, session, context) == made
    assert world.wire.reason(create, session, world.on_behalf(make_context(world.user.tenant_id))) == ""
    assert world.wire.reason(create, session, world.metadata(create)) == "SESSION_EXISTS"


def test_a_repeated_registration_is_the_same_version(world: World) -> None:
    rpc = rpc_named("RegisterAgent")
    request = registry_pb2.RegisterAgentRequest(document=orjson.dumps(echo_agent(unique("agent"))))
    first, again = (world.wire.answer(rpc, request, world.metadata(rpc)) for _ in range(2))
    assert (first.created, again.created, again.agent) == (True, False, first.agent)


def test_a_repeated_start_starts_one_run(world: World) -> None:
    rpc = rpc_named("StartRun")
    request = execution_pb2.StartRunRequest(agent=world.agent, input=b"{}", idempotency_key=unique("key"))
    first, again = (world.wire.answer(rpc, request, world.metadata(rpc)).run_id for _ in range(2))
    assert first == again
    batch = rpc_named("StartRuns")
    frame: Any = world.request(batch)
    results = [world.wire.answers(batch, [frame], world.metadata(batch))[-1].results[0] for _ in range(2)]
    assert {result.run_id for result in results} == {frame.starts[0].context.run_id}
    assert [result.status.code for result in results] == [0, 0]


def test_a_wait_ends_before_its_callers_time_does(world: World) -> None:
    rpc = rpc_named("WaitRun")
    request = state_pb2.WaitRunRequest(run_id=world.start())
    (answer,) = world.wire.open(rpc, [request], world.metadata(rpc), seconds=1.0)
    assert answer.run.state == types_pb2.RUN_STATE_RUNNING


def test_the_silent_rpcs_are_streams_from_the_server() -> None:
    assert all(rpc_named(name).method.server_streaming for name in SILENT)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])
