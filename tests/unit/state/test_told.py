"""What somebody outside is told of a run's end: signed as the standard's own library checks it, and not for ever."""

from __future__ import annotations

from datetime import UTC, datetime

import orjson
import pytest
from mainspring.v1 import types_pb2
from mainspring_state.core.told import ATTEMPTS_MAX, is_private, next_pause_seconds, tenant_key, write_message
from standardwebhooks import Webhook, WebhookVerificationError

pytestmark = pytest.mark.unit

SECRET = "a secret of the platform, long enough"


def ended(**fields: object) -> types_pb2.Run:
    run = types_pb2.Run(
        run_id="r", tenant_id="acme", agent="lookup", state=types_pb2.RUN_STATE_COMPLETED, result=b'{"a":1}'
    )
    run.MergeFrom(types_pb2.Run(**fields))  # type: ignore[arg-type]  # the test's own fields
    return run


def test_the_receiver_can_check_the_signature_with_its_tenants_key_alone() -> None:
    message = write_message(ended(), secret=SECRET, now=datetime.now(UTC))
    told = Webhook(tenant_key(SECRET, "acme")).verify(message.body, dict(message.headers))
    assert told["type"] == "run.completed"
    assert told["data"]["result"] == {"a": 1}
    assert message.headers["webhook-id"] == "r"
    with pytest.raises(WebhookVerificationError):
        Webhook(tenant_key(SECRET, "other")).verify(message.body, dict(message.headers))


def test_an_error_is_told_whole() -> None:
    error = types_pb2.RunError(code="UNAVAILABLE", reason="MODEL_FAILED", message="Gone.", metadata={"step": "1"})
    message = write_message(ended(state=types_pb2.RUN_STATE_FAILED, error=error), secret=SECRET, now=datetime.now(UTC))
    told = orjson.loads(message.body)
    assert told["type"] == "run.failed"
    assert told["data"]["error"] == {
        "code": "UNAVAILABLE",
        "reason": "MODEL_FAILED",
        "message": "Gone.",
        "metadata": {"step": "1"},
    }


def test_pauses_grow_and_end() -> None:
    pauses = [next_pause_seconds(attempts, chance=1.0) for attempts in range(1, ATTEMPTS_MAX + 1)]
    assert pauses[:3] == [5.0, 10.0, 20.0]
    assert pauses[-1] is None
    assert all(pause is not None and pause <= 3_600 for pause in pauses[:-1])
    assert next_pause_seconds(1, chance=0.0) == 2.5


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "::1", "fe80::1%eth0", "[fd00::1]", "0.0.0.0", "?"],
)
def test_addresses_of_ones_own_network_are_private(address: str) -> None:
    assert is_private(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946"])
def test_public_addresses_are_not(address: str) -> None:
    assert not is_private(address)
