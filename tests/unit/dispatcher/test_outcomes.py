"""What workers say is checked, for a worker is not part of the platform."""

from __future__ import annotations

import pytest
from mainspring.v1 import dispatcher_pb2 as pb
from mainspring.v1 import types_pb2
from mainspring_dispatcher.core import outcomes
from mainspring_kit.errors import MainspringError

pytestmark = pytest.mark.unit


def test_a_good_result_is_passed_through_as_it_is() -> None:
    result = pb.WorkerResult(dispatch_id=1, status=outcomes.OK, result=b'{"a": [1, "\xc3\xa9"]}')
    assert outcomes.checked(result, "echo") is result


@pytest.mark.parametrize("body", [b"", b"{", b'1,"run_id":"other"', b"NaN", b"\xff", b'{"a":1}{"b":2}'])
def test_a_result_that_is_not_json_is_the_tools_failure(body: bytes) -> None:
    checked = outcomes.checked(pb.WorkerResult(status=outcomes.OK, result=body), "echo")
    assert (checked.status, checked.error.reason, checked.result) == (outcomes.ERROR, "TOOL_FAILED", b"")
    assert checked.error.metadata["tool"] == "echo"


def test_a_result_over_the_bound_is_refused_with_its_size() -> None:
    body = b'"' + b"x" * outcomes.RESULT_BYTES_MAX + b'"'
    checked = outcomes.checked(pb.WorkerResult(status=outcomes.OK, result=body), "echo")
    assert checked.error.reason == "PAYLOAD_TOO_LARGE"
    assert checked.error.metadata["bytes"] == str(len(body))


def test_an_error_is_bounded_and_keeps_its_meaning() -> None:
    said = types_pb2.RunError(
        code="NOT_FOUND",
        reason="NO_SUCH_INVOICE",
        message="m" * 10_000,
        metadata={f"key{number}": "v" * 1_000 for number in range(100)},
    )
    checked = outcomes.checked(pb.WorkerResult(status=outcomes.ERROR, error=said), "bill")
    assert (checked.error.code, checked.error.reason) == ("NOT_FOUND", "NO_SUCH_INVOICE")
    assert len(checked.error.message) == outcomes.MESSAGE_CHARACTERS_MAX
    assert len(checked.error.metadata) == outcomes.METADATA_PAIRS_MAX
    assert max(map(len, checked.error.metadata.values())) == outcomes.METADATA_CHARACTERS_MAX


@pytest.mark.parametrize("code", ["", "OK", "NONSENSE", "not_found"])
def test_a_code_that_grpc_does_not_have_becomes_unknown(code: str) -> None:
    said = types_pb2.RunError(code=code, message="m")
    checked = outcomes.checked(pb.WorkerResult(status=outcomes.ERROR, error=said), "bill")
    assert (checked.error.code, checked.error.reason) == ("UNKNOWN", "TOOL_FAILED")


@pytest.mark.parametrize("status", [0, 3, 99])
def test_a_status_that_no_worker_may_say_is_the_tools_failure(status: int) -> None:
    result = pb.WorkerResult.FromString(b"\x10" + bytes([status]))
    checked = outcomes.checked(result, "echo")
    assert (checked.status, checked.error.reason) == (outcomes.ERROR, "TOOL_FAILED")


def test_a_failure_without_an_error_gets_one() -> None:
    checked = outcomes.checked(pb.WorkerResult(status=outcomes.TIMED_OUT), "echo")
    assert (checked.status, checked.error.reason) == (outcomes.TIMED_OUT, "TOOL_FAILED")


TOOL = types_pb2.Tool(name="echo")


@pytest.mark.parametrize(
    ("hello", "field"),
    [
        (pb.AttachHello(tools=[TOOL], concurrency=1), "hello.worker_id"),
        (pb.AttachHello(worker_id="w", concurrency=1), "hello.tools"),
        (pb.AttachHello(worker_id="w", tools=[TOOL, TOOL], concurrency=1), "hello.tools"),
        (pb.AttachHello(worker_id="w", tools=[TOOL]), "hello.concurrency"),
        (pb.AttachHello(worker_id="w", tools=[TOOL], concurrency=10_001), "hello.concurrency"),
    ],
)
def test_a_hello_that_breaks_the_contract_is_refused(hello: pb.AttachHello, field: str) -> None:
    with pytest.raises(MainspringError) as raised:
        outcomes.check_hello(hello)
    assert (raised.value.reason_name, raised.value.metadata["field"]) == ("REQUEST_INVALID", field)


def test_a_good_hello_passes() -> None:
    outcomes.check_hello(pb.AttachHello(worker_id="w", tools=[TOOL], concurrency=1))
