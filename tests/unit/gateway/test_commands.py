"""Client frames are read exactly: every field known, of its type, within its bounds."""

import orjson
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from mainspring.v1 import types_pb2
from mainspring_gateway.core.commands import (
    Approve,
    Control,
    FollowRun,
    Hello,
    Ping,
    Renewal,
    Retry,
    Signal,
    Start,
    UnfollowRun,
    approval_id_of,
    decode_object,
    frame_id_of,
    read_command,
    read_fork,
    read_reason,
    read_start,
    run_id_of,
)
from mainspring_kit.errors import MainspringError

pytestmark = pytest.mark.unit

RUN = "01a20f61-31f6-7254-a0c7-b29527f68656"
DATA = '[1,{"a":"ä"}]'.encode()


def refused(fields: dict[str, object]) -> MainspringError:
    with pytest.raises(MainspringError) as raised:
        read_command(fields)
    return raised.value


@pytest.mark.parametrize(
    ("fields", "command"),
    [
        ({"op": "hello", "token": "t"}, Hello(None, "t")),
        ({"op": "token", "id": 3, "token": "t"}, Renewal(3, "t")),
        ({"op": "ping", "id": "p"}, Ping("p")),
        ({"op": "follow", "run_id": RUN}, FollowRun(None, RUN, 0)),
        ({"op": "follow", "id": "f", "run_id": RUN.upper(), "after_seq": 17}, FollowRun("f", RUN, 17)),
        ({"op": "unfollow", "run_id": RUN}, UnfollowRun(None, RUN)),
        ({"op": "cancel", "run_id": RUN}, Control(None, "cancel", RUN)),
        ({"op": "cancel", "run_id": RUN, "reason": "enough"}, Control(None, "cancel", RUN, "enough")),
        ({"op": "pause", "run_id": RUN, "reason": "lunch"}, Control(None, "pause", RUN, "lunch")),
        ({"op": "resume", "id": 1, "run_id": RUN}, Control(1, "resume", RUN)),
        ({"op": "retry", "id": "r", "run_id": RUN}, Retry("r", RUN)),
        ({"op": "signal", "run_id": RUN, "name": "go"}, Signal(None, RUN, "go", b"")),
        ({"op": "signal", "run_id": RUN, "name": "go", "data": [1, {"a": "ä"}]}, Signal(None, RUN, "go", DATA)),
        ({"op": "signal", "run_id": RUN, "name": "go", "data": False}, Signal(None, RUN, "go", b"false")),
        (
            {"op": "approve", "approval_id": f"{RUN}.4", "decision": "allow", "data": [1, {"a": "ä"}]},
            Approve(None, f"{RUN}.4", types_pb2.APPROVAL_DECISION_ALLOW, DATA),
        ),
        (
            {"op": "approve", "id": 2, "approval_id": f"{RUN}.4", "decision": "deny", "data": None},
            Approve(2, f"{RUN}.4", types_pb2.APPROVAL_DECISION_DENY, b""),
        ),
        ({"op": "start", "agent": "lookup"}, Start(None, "lookup", "", "", b"{}", "", "")),
        (
            {"op": "start", "agent": "a", "priority": -3, "start_time": "2026-11-24T03:06:12.5+01:00"},
            Start(None, "a", "", "", b"{}", "", "", -3, Timestamp(seconds=1795485972, nanos=500_000_000)),
        ),
        (
            {
                "op": "start",
                "id": "1",
                "agent": "lookup",
                "alias": "stable",
                "version": "2",
                "input": {"value": [1, None, "ä"]},
                "session_id": "s",
                "idempotency_key": "k",
            },
            Start("1", "lookup", "stable", "2", '{"value":[1,null,"ä"]}'.encode(), "s", "k"),
        ),
    ],
)
def test_each_op_is_read(fields: dict[str, object], command: object) -> None:
    assert read_command(fields) == command


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "op"),
        ({"op": 5}, "op"),
        ({"op": "dance"}, "op"),
        ({"op": "ping", "bogus": 1}, "bogus"),
        ({"op": "ping", "id": 1.5}, "id"),
        ({"op": "ping", "id": True}, "id"),
        ({"op": "ping", "id": "x" * 129}, "id"),
        ({"op": "hello"}, "token"),
        ({"op": "start"}, "agent"),
        ({"op": "start", "agent": ""}, "agent"),
        ({"op": "start", "agent": "a" * 64}, "agent"),
        ({"op": "start", "agent": 5}, "agent"),
        ({"op": "start", "agent": "a", "input": "text"}, "input"),
        ({"op": "start", "agent": "a", "input": None}, "input"),
        ({"op": "start", "agent": "a", "session_id": ""}, "session_id"),
        ({"op": "start", "agent": "a", "session_id": None}, "session_id"),
        ({"op": "start", "agent": "a", "idempotency_key": "k" * 129}, "idempotency_key"),
        ({"op": "start", "agent": "a", "user_id": "somebody-else"}, "user_id"),
        ({"op": "follow"}, "run_id"),
        ({"op": "follow", "run_id": RUN, "after_seq": -1}, "after_seq"),
        ({"op": "follow", "run_id": RUN, "after_seq": 1.0}, "after_seq"),
        ({"op": "follow", "run_id": RUN, "after_seq": True}, "after_seq"),
        ({"op": "follow", "run_id": RUN, "after_seq": 1 << 63}, "after_seq"),
        ({"op": "cancel", "run_id": RUN, "reason": "r" * 1_001}, "reason"),
        ({"op": "resume", "run_id": RUN, "reason": "r"}, "reason"),
        ({"op": "retry"}, "run_id"),
        ({"op": "signal", "run_id": RUN}, "name"),
        ({"op": "signal", "run_id": RUN, "name": "n" * 101}, "name"),
        ({"op": "approve", "approval_id": f"{RUN}.4"}, "decision"),
        ({"op": "approve", "approval_id": f"{RUN}.4", "decision": "maybe"}, "decision"),
        ({"op": "approve", "approval_id": f"{RUN}.4", "decision": ["allow"]}, "decision"),
        ({"op": "start", "agent": "a", "priority": 101}, "priority"),
        ({"op": "start", "agent": "a", "priority": True}, "priority"),
        ({"op": "start", "agent": "a", "start_time": "tomorrow"}, "start_time"),
        ({"op": "start", "agent": "a", "start_time": "2026-11-24T03:06:12"}, "start_time"),
        ({"op": "start", "agent": "a", "start_time": "0001-01-01T00:00:00+01:00"}, "start_time"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, object], field: str) -> None:
    error = refused(fields)
    assert (error.reason_name, error.metadata["field"]) == ("REQUEST_INVALID", field)
    assert error.violations[0].field == field


@pytest.mark.parametrize(
    "fields", [{"session_id": "s"}, {"scope": "user", "after": {}, "since": "2026-11-24T00:00:00Z"}]
)
def test_a_later_way_to_follow_says_so(fields: dict[str, object]) -> None:
    assert refused({"op": "follow", **fields}).reason_name == "NOT_IMPLEMENTED"


@pytest.mark.parametrize("text", ["", "1", "no-uuid", RUN[:-1], RUN + "0", RUN.replace("-", ""), "../x", None, 5])
def test_what_can_be_no_runs_id_is_no_run(text: object) -> None:
    with pytest.raises(MainspringError, match="RUN_NOT_FOUND"):
        run_id_of(text)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"5", b'"x"', b"null", b'{"a":NaN}', b'{"a":Infinity}', b"\xff", b"[" * 2_000]
)
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(MainspringError, match="REQUEST_INVALID"):
        decode_object(data)


@given(st.binary(max_size=64) | st.text(max_size=64).map(str.encode))
def test_any_bytes_are_an_object_or_refused(data: bytes) -> None:
    try:
        assert isinstance(decode_object(data), dict)
    except MainspringError as error:
        assert error.reason_name == "REQUEST_INVALID"


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 53), 1 << 53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


_FIELDS = (
    "op id agent input run_id after_seq token session_id x name data decision approval_id priority start_time reason"
)
_OPS = "start follow cancel unfollow hello token ping pause resume retry signal approve"


@given(
    st.dictionaries(st.sampled_from(_FIELDS.split()), _VALUES).map(lambda fields: {"op": "start", **fields}),
    st.sampled_from(_OPS.split()),
)
def test_any_object_is_a_command_or_refused(fields: dict[str, object], op: str) -> None:
    try:
        read_command({**fields, "op": op})
    except MainspringError as error:
        assert error.reason_name in {
            "REQUEST_INVALID",
            "RUN_NOT_FOUND",
            "APPROVAL_NOT_FOUND",
            "NOT_IMPLEMENTED",
        }


@given(st.dictionaries(st.text(max_size=8), _VALUES, max_size=4))
def test_an_input_arrives_as_it_was_sent(value: dict[str, object]) -> None:
    assert orjson.loads(read_start({"agent": "a", "input": value}).input) == value


def test_an_input_that_nests_too_deep_is_refused() -> None:
    """The parser takes a thousand levels, the writer fewer."""
    data = b'{"op":"start","agent":"a","input":{"a":' + b"[" * 300 + b"]" * 300 + b"}}"
    assert refused(dict(decode_object(data))).metadata["field"] == "input"


@pytest.mark.parametrize("frame_id", [None, True, 1.5, [], {}, "x" * 129])
def test_an_id_that_is_none_is_not_echoed(frame_id: object) -> None:
    assert frame_id_of({"id": frame_id}) is None


def test_the_key_of_the_header_stands_in_for_the_field() -> None:
    assert read_start({"agent": "a"}, idempotency_key="k").idempotency_key == "k"
    assert read_start({"agent": "a", "idempotency_key": "k"}, idempotency_key="k").idempotency_key == "k"
    with pytest.raises(MainspringError, match="differs"):
        read_start({"agent": "a", "idempotency_key": "other"}, idempotency_key="k")


def test_a_wish_has_a_reason_or_none() -> None:
    assert read_reason({}) == ""
    assert read_reason({"reason": "enough"}) == "enough"
    with pytest.raises(MainspringError, match="REQUEST_INVALID"):
        read_reason({"why": "enough"})
    with pytest.raises(MainspringError, match="REQUEST_INVALID"):
        read_reason({"reason": "enough"}, known=())


def test_a_fork_names_the_event_and_what_differs() -> None:
    read = read_fork({"seq": 4, "session_id": "s", "version": "2"}, RUN)
    assert (read.run_id, read.seq, read.session_id, read.version) == (RUN, 4, "s", "2")
    for wrong in ({}, {"seq": 0}, {"seq": "4"}, {"seq": 1, "run_id": RUN}):
        with pytest.raises(MainspringError, match="REQUEST_INVALID"):
            read_fork(wrong, RUN)


@pytest.mark.parametrize("text", ["", RUN, f"{RUN}.", f"{RUN}.x", f"{RUN}.1.2", f"{RUN}.{'9' * 19}", "1.1", None, 5])
def test_what_can_be_no_approvals_id_is_no_approval(text: object) -> None:
    with pytest.raises(MainspringError, match="APPROVAL_NOT_FOUND"):
        approval_id_of(text)


@pytest.mark.parametrize("number", ["18446744073709551616", "-9223372036854775809", "1" * 300])
def test_an_integer_that_would_become_another_number_is_refused(number: str) -> None:
    for data in (f'{{"input":{{"a":[{number}]}}}}', f'{{"input":{{"a":"\\"","b":{number}}}}}'.encode()):
        with pytest.raises(MainspringError, match="64 bits"):
            decode_object(data)


@pytest.mark.parametrize(
    "number", ["18446744073709551615", "-9223372036854775808", "1e300", "0.12345678901234567890123"]
)
def test_other_numbers_and_digits_in_texts_are_taken(number: str) -> None:
    assert decode_object(f'{{"a":"\\"99999999999999999999999","b":{number}}}')
