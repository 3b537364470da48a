"""Problem details name the error as the socket does, and the request they answer."""

import orjson
import pytest
from mainspring_gateway.core.problems import problem
from mainspring_kit.errors import RULES, MainspringError, Reason, Violation

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("reason", RULES)
def test_every_reason_makes_a_problem(reason: str) -> None:
    body = orjson.loads(problem(MainspringError(RULES[reason], "what next"), "id-1"))
    assert body["type"] == f"urn:mainspring:reason:{reason}"
    assert body["title"]
    assert body["status"] == RULES[reason].http_status
    assert body["detail"] == "what next"
    assert body["instance"] == "urn:uuid:id-1"
    assert (body["code"], body["reason"], body["metadata"]) == (RULES[reason].code.name, reason, {})


def test_faults_of_fields_and_the_time_to_wait_are_told() -> None:
    error = MainspringError(
        Reason.REQUEST_INVALID,
        "no",
        violations=[Violation("agent", "is missing")],
        retry_after_seconds=1.5,
        field="agent",
    )
    body = orjson.loads(problem(error, "id-1"))
    assert body["violations"] == [{"field": "agent", "description": "is missing"}]
    assert body["retry_after_ms"] == 1500
