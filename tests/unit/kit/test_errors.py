"""Errors survive the way over the wire, and the one table covers every reason."""

from typing import TypeVar

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from mainspring.v1 import errors_pb2
from mainspring_kit.errors import RULES, MainspringError, Reason, Violation, from_status, to_status

pytestmark = pytest.mark.unit


Detail = TypeVar("Detail", bound=Message)


def detail(status: status_pb2.Status, kind: type[Detail]) -> Detail:
    found = [kind.FromString(item.value) for item in status.details if item.Is(kind.DESCRIPTOR)]
    assert len(found) == 1, f"{kind.__name__} is there {len(found)} times"
    return found[0]


@pytest.mark.parametrize("name", [value.name for value in errors_pb2.ErrorReason.DESCRIPTOR.values][1:])
def test_every_reason_has_a_rule_and_survives_the_wire(name: str) -> None:
    rule = RULES[name.removeprefix("ERROR_REASON_")]
    assert rule.http_status >= 400
    assert rule.code is not grpc.StatusCode.OK
    error = MainspringError(rule, "what happened and what to do", key="value")
    again = from_status(status_pb2.Status.FromString(to_status(error).SerializeToString()))
    assert (again.rule, again.code, again.metadata, again.message) == (
        rule,
        error.code,
        {"key": "value"},
        error.message,
    )


def test_unavailable_and_exhausted_say_when_to_try_again() -> None:
    status = to_status(MainspringError(Reason.QUEUE_FULL, "full", queue="appends", limit=5))
    assert detail(status, error_details_pb2.RetryInfo).retry_delay.seconds == 1
    assert detail(status, error_details_pb2.QuotaFailure).violations[0].subject == "appends"
    assert from_status(status).retry_after_seconds == 1.0


def test_not_found_names_the_resource_and_precondition_its_subject() -> None:
    missing = to_status(MainspringError(Reason.RUN_NOT_FOUND, "no such run", run_id="r1"))
    assert detail(missing, error_details_pb2.ResourceInfo).resource_name == "r1"
    ended = to_status(MainspringError(Reason.RUN_ENDED, "it has ended", run_id="r1", state="FAILED"))
    assert detail(ended, error_details_pb2.PreconditionFailure).violations[0].subject == "r1"


def test_violations_are_listed_and_capped() -> None:
    faults = [Violation(f"field{number}", "is wrong") for number in range(100)]
    again = from_status(to_status(MainspringError(Reason.REQUEST_INVALID, "bad", violations=faults, field="field0")))
    assert [fault.field for fault in again.violations] == [f"field{number}" for number in range(20)]


def test_an_invalid_field_is_a_violation_by_itself() -> None:
    status = to_status(MainspringError(Reason.REQUEST_INVALID, "The events are too many.", field="events"))
    (violation,) = detail(status, error_details_pb2.BadRequest).field_violations
    assert (violation.field, violation.description) == ("events", "The events are too many.")


def test_a_status_of_other_origin_becomes_the_nearest_reason() -> None:
    assert from_status(status_pb2.Status(code=code_pb2.UNAVAILABLE, message="gone")).reason_name == "PEER_UNAVAILABLE"
    assert from_status(status_pb2.Status(code=code_pb2.DATA_LOSS, message="?")).reason_name == "INTERNAL"


def test_an_open_reason_takes_the_raisers_code() -> None:
    error = MainspringError(Reason.TOOL_FAILED, "it broke", code=grpc.StatusCode.UNAVAILABLE, tool="t")
    assert from_status(to_status(error)).code is grpc.StatusCode.UNAVAILABLE
    assert error.http_status == 503


def test_a_reason_that_the_contract_lacks_is_an_error() -> None:
    with pytest.raises(AttributeError, match="NO_SUCH"):
        _ = Reason.NO_SUCH
