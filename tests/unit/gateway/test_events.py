"""Events become the JSON of the protocol's page: the names of its table, optional keys left out, leaves as they are."""

import orjson
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from mainspring.v1 import events_pb2 as pb
from mainspring.v1 import types_pb2
from mainspring_gateway.core.events import TERMINAL_TYPES, encode, is_terminal, sse_block, time_text
from mainspring_kit.errors import MainspringError

pytestmark = pytest.mark.unit

USAGE = types_pb2.Usage(input_tokens=3, output_tokens=2, cost_usd=0.25)
USAGE_DATA = {"input_tokens": 3, "output_tokens": 2, "cost_usd": 0.25}
ERROR = types_pb2.RunError(code="UNAVAILABLE", reason="TOOL_FAILED", message="no", metadata={"tool": "t"})
ERROR_DATA = {"code": "UNAVAILABLE", "reason": "TOOL_FAILED", "message": "no", "metadata": {"tool": "t"}}
MOMENT = Timestamp(seconds=1_795_489_572, nanos=5_000_000)
MOMENT_TEXT = "2026-11-24T03:06:12.005Z"
STAGES = [types_pb2.Stage(name="initialization", duration_ms=0.5)]

PAYLOADS = {
    "agent_started": (
        pb.AgentStarted(agent_version="2", input=b'{"a": 1}', ordinal=4, attempt=1),
        {"agent_version": "2", "input": {"a": 1}, "ordinal": 4, "attempt": 1},
    ),
    "agent_thinking": (
        pb.AgentThinking(
            step=1,
            text="hm",
            model="scripted/x",
            usage=USAGE,
            planned_calls=[pb.PlannedCall(call_id="c", tool="t", arguments=b"{}")],
            provider_state=b"private",
            result=b'"r"',
        ),
        {
            "step": 1,
            "text": "hm",
            "model": "scripted/x",
            "usage": USAGE_DATA,
            "planned_calls": [{"call_id": "c", "tool": "t"}],
        },
    ),
    "tool_executing": (
        pb.ToolExecuting(call_id="c", tool="t", arguments=b'{"b":2}', effect=types_pb2.EFFECT_CLASS_KEYED, attempt=2),
        {"call_id": "c", "tool": "t", "arguments": {"b": 2}, "effect": "keyed", "attempt": 2},
    ),
    "tool_completed": (
        pb.ToolCompleted(
            call_id="c", tool="t", status=types_pb2.TOOL_STATUS_OK, result=b"[1]", duration_ms=1.5, attempts=1
        ),
        {
            "call_id": "c",
            "tool": "t",
            "status": "ok",
            "result": [1],
            "cached": False,
            "duration_ms": 1.5,
            "attempts": 1,
        },
    ),
    "agent_completed": (
        pb.AgentCompleted(result=b'{"x":null}', usage=USAGE, duration_ms=9.5, stages=STAGES),
        {
            "result": {"x": None},
            "usage": USAGE_DATA,
            "duration_ms": 9.5,
            "stages": [{"name": "initialization", "duration_ms": 0.5}],
        },
    ),
    "agent_failed": (
        pb.AgentFailed(error=ERROR, duration_ms=1, stages=STAGES, usage=USAGE),
        {"error": ERROR_DATA, "duration_ms": 1.0},
    ),
    "agent_timed_out": (
        pb.AgentTimedOut(error=ERROR, duration_ms=1, stages=STAGES, usage=USAGE),
        {"error": ERROR_DATA, "duration_ms": 1.0},
    ),
    "agent_cancelled": (
        pb.AgentCancelled(
            requested_by="ann",
            reason="enough",
            receipt=[pb.CancelReceipt(call_id="c", acknowledged=True, after_ms=3)],
            duration_ms=7,
            stages=STAGES,
            usage=USAGE,
        ),
        {
            "requested_by": "ann",
            "reason": "enough",
            "receipt": [{"call_id": "c", "acknowledged": True, "after_ms": 3.0}],
            "duration_ms": 7.0,
        },
    ),
    "run_recovered": (
        pb.RunRecovered(attempt=1, executor="e", lost_calls=["c"]),
        {"attempt": 1, "executor": "e", "lost_calls": ["c"], "handed_back": False},
    ),
    "agent_paused": (
        pb.AgentPaused(requested_by="ann", reason="lunch"),
        {"requested_by": "ann", "reason": "lunch"},
    ),
    "agent_resumed": (pb.AgentResumed(requested_by="ann"), {"requested_by": "ann"}),
    "agent_waiting": (
        pb.AgentWaiting(wait_for=types_pb2.WAIT_KIND_SIGNAL, until=MOMENT, detail="the signal go", call_ids=["c"]),
        {"for": "signal", "until": MOMENT_TEXT, "detail": "the signal go", "call_ids": ["c"]},
    ),
    "approval_requested": (
        pb.ApprovalRequested(
            approval_id="r.4",
            title="May I?",
            arguments=b'{"a":1}',
            answer_schema=b'{"type":"object"}',
            expires_time=MOMENT,
            role="operator",
            call_id="c",
            kind=types_pb2.APPROVAL_KIND_UNKNOWN_OUTCOME,
        ),
        {
            "approval_id": "r.4",
            "kind": "unknown_outcome",
            "title": "May I?",
            "arguments": {"a": 1},
            "answer_schema": {"type": "object"},
            "expires_time": MOMENT_TEXT,
            "role": "operator",
            "call_id": "c",
        },
    ),
    "approval_resolved": (
        pb.ApprovalResolved(
            approval_id="r.4", decision=types_pb2.APPROVAL_DECISION_ALLOW, data=b'{"ok":true}', by="bob"
        ),
        {"approval_id": "r.4", "decision": "allow", "data": {"ok": True}, "by": "bob"},
    ),
    "signal_received": (
        pb.SignalReceived(name="go", data=b"[1]", by="ann", request_id="q"),
        {"name": "go", "data": [1], "by": "ann"},
    ),
    "agent_handed_off": (
        pb.AgentHandedOff(from_agent="a", to_agent="b", to_version="3", reason="it knows more"),
        {"from": "a", "to": "b", "to_version": "3", "reason": "it knows more"},
    ),
    "attempt_failed": (
        pb.AttemptFailed(step=2, attempt=1, error=ERROR, retry_time=MOMENT),
        {"step": 2, "attempt": 1, "error": ERROR_DATA, "retry_time": MOMENT_TEXT},
    ),
}


def event(**payload: object) -> pb.RunEvent:
    return pb.RunEvent(
        run_id="r",
        seq=4,
        event_time=Timestamp(seconds=1_795_489_572, nanos=123_456_789),
        append_id="a",
        session_id="s",
        agent="lookup",
        trace_id="t",
        **payload,  # type: ignore[arg-type]  # a payload by its name
    )


def test_every_payload_of_the_contract_is_shown_here() -> None:
    assert set(PAYLOADS) == {field.name for field in pb.RunEvent.DESCRIPTOR.oneofs_by_name["payload"].fields}


@pytest.mark.parametrize("kind", PAYLOADS)
def test_an_event_has_the_fields_of_its_row(kind: str) -> None:
    message, data = PAYLOADS[kind]
    encoded = encode(event(**{kind: message}))
    assert orjson.loads(encoded.payload) == {
        "op": "event",
        "type": kind,
        "run_id": "r",
        "seq": 4,
        "event_time": "2026-11-24T03:06:12.123Z",
        "session_id": "s",
        "agent": "lookup",
        "trace_id": "t",
        "data": data,
    }
    assert encoded.frame.endswith(encoded.payload)
    assert encoded.seq == 4


@pytest.mark.parametrize("kind", PAYLOADS)
def test_four_types_end_a_run(kind: str) -> None:
    ended = event(**{kind: PAYLOADS[kind][0]})
    assert encode(ended).is_terminal == is_terminal(ended) == (kind in TERMINAL_TYPES)


def test_a_failed_call_has_its_error_in_place_of_a_result() -> None:
    outcome = pb.ToolCompleted(call_id="c", tool="t", status=types_pb2.TOOL_STATUS_TIMED_OUT, error=ERROR, attempts=3)
    data = orjson.loads(encode(event(tool_completed=outcome)).payload)["data"]
    assert data["status"] == "timed_out"
    assert data["error"] == {"code": "UNAVAILABLE", "reason": "TOOL_FAILED", "message": "no"}
    assert "result" not in data


def test_the_run_above_is_named_only_where_there_is_one() -> None:
    child = event(agent_started=pb.AgentStarted())
    child.parent_run_id, child.root_run_id = "p", "q"
    data = orjson.loads(encode(child).payload)["data"]
    assert (data["parent_run_id"], data["root_run_id"]) == ("p", "q")


def test_what_a_call_waits_for_and_the_run_that_it_starts_are_named() -> None:
    waits = pb.ToolExecuting(call_id="c", tool="run.sleep", arguments=b"{}", wake_time=MOMENT)
    assert orjson.loads(encode(event(tool_executing=waits)).payload)["data"]["wake_time"] == MOMENT_TEXT
    starts = encode(event(tool_executing=pb.ToolExecuting(call_id="c", tool="agent.b", sub_run_id="x")))
    assert (orjson.loads(starts.payload)["data"]["sub_run_id"], starts.sub_run_id) == ("x", "x")


def test_a_forks_copies_say_which_event_they_repeat() -> None:
    started = pb.AgentStarted(source_run_id="o", source_seq=4, attempt=1)
    copied = event(agent_started=started)
    copied.source_seq = 3
    fields = orjson.loads(encode(copied).payload)
    assert (fields["source_seq"], fields["data"]["source_run_id"], fields["data"]["source_seq"]) == (3, "o", 4)


def test_a_failed_attempt_is_a_steps_or_a_calls() -> None:
    failed = event(attempt_failed=pb.AttemptFailed(call_id="c", attempt=2, error=ERROR))
    data = orjson.loads(encode(failed).payload)["data"]
    assert data == {"call_id": "c", "attempt": 2, "error": ERROR_DATA}


def test_an_event_says_which_text_it_ends() -> None:
    assert encode(event(agent_thinking=pb.AgentThinking(step=3))).step == 3
    ends = {kind for kind in PAYLOADS if encode(event(**{kind: PAYLOADS[kind][0]})).ends_text}
    assert ends == {*TERMINAL_TYPES, "agent_paused", "agent_waiting", "run_recovered"}


def test_leaves_pass_through_to_the_byte() -> None:
    leaf = b'{"big":12345678901234567890123,"spaced" : 1.0}'
    assert leaf in encode(event(agent_started=pb.AgentStarted(input=leaf))).payload


def test_a_later_payload_is_skipped_only_where_that_is_safe() -> None:
    later = event()
    later.safe_to_skip = True
    assert orjson.loads(encode(later).payload)["type"] == "unknown"
    later.safe_to_skip = False
    with pytest.raises(MainspringError, match="later release"):
        encode(later)


def test_a_time_that_is_none_is_an_error_of_that_event_alone() -> None:
    broken = event(agent_started=pb.AgentStarted())
    broken.event_time.seconds = 10**15
    with pytest.raises(MainspringError, match="can't be shown"):
        encode(broken)


def test_an_sse_block_is_one_line_of_data() -> None:
    encoded = encode(event(agent_started=pb.AgentStarted(input=b'{\r\n "a": 1\n}')))
    lines = sse_block(encoded).split(b"\n")
    assert lines[0] == b"id: 4"
    assert lines[2:] == [b"", b""]
    assert orjson.loads(lines[1].removeprefix(b"data: ")) == orjson.loads(encoded.payload)


@pytest.mark.parametrize(("nanos", "text"), [(0, "000"), (999_999, "000"), (1_000_000, "001"), (999_999_999, "999")])
def test_times_have_milliseconds(nanos: int, text: str) -> None:
    assert time_text(Timestamp(seconds=0, nanos=nanos)) == f"1970-01-01T00:00:00.{text}Z"


def test_an_errors_metadata_comes_in_one_order_live_and_from_the_log() -> None:
    names = list("hgfedcba")
    error = types_pb2.RunError(metadata=dict.fromkeys(names, ""))
    event = pb.RunEvent(seq=2, agent_failed=pb.AgentFailed(error=error))
    metadata = orjson.loads(encode(event).payload)["data"]["error"]["metadata"]
    assert list(metadata) == sorted(names)
