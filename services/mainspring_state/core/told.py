"""What somebody outside is told of a run's end: the signed message, and when it is tried again.

The form is that of Standard Webhooks (standardwebhooks.com): `webhook-id`, `webhook-timestamp`, `webhook-signature`.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import orjson
from google.protobuf.timestamp_pb2 import Timestamp
from mainspring.v1 import types_pb2
from standardwebhooks import Webhook

ATTEMPTS_MAX: Final = 12
FIRST_PAUSE_SECONDS: Final = 5.0
PAUSE_SECONDS_MAX: Final = 3_600.0
GONE: Final = 410

_KEY_PURPOSE: Final = b"mainspring webhook key of tenant "


@dataclass(frozen=True, slots=True)
class Message:
    """One POST."""

    headers: Mapping[str, str]
    body: bytes


def tenant_key(secret: str, tenant_id: str) -> bytes:
    """The key that signs a tenant's messages: derived, so that nobody has to keep it. 32 bytes."""
    return hmac.digest(secret.encode(), _KEY_PURPOSE + tenant_id.encode(), hashlib.sha256)


def write_message(run: types_pb2.Run, *, secret: str, now: datetime) -> Message:
    """What is told of the run's end; the same id at every attempt."""
    state = types_pb2.RunState.Name(run.state).removeprefix("RUN_STATE_")
    error = None
    if run.HasField("error"):
        error = {
            "code": run.error.code,
            "reason": run.error.reason,
            "message": run.error.message,
            "metadata": dict(run.error.metadata),
        }
    body = orjson.dumps(
        {
            "type": f"run.{state.lower()}",
            "timestamp": _moment(run.end_time),
            "data": {
                "run_id": run.run_id,
                "tenant_id": run.tenant_id,
                "user_id": run.user_id,
                "session_id": run.session_id,
                "agent": run.agent,
                "agent_version": run.agent_version,
                "state": state,
                "result": orjson.Fragment(run.result) if run.result else None,
                "error": error,
                "create_time": _moment(run.create_time),
                "end_time": _moment(run.end_time),
            },
        }
    )
    signature = Webhook(tenant_key(secret, run.tenant_id)).sign(msg_id=run.run_id, timestamp=now, data=body.decode())
    headers = {
        "content-type": "application/json",
        "webhook-id": run.run_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": signature,
    }
    return Message(headers, body)


def next_pause_seconds(attempts: int, *, chance: float) -> float | None:
    """How long to wait after so many attempts, half of it by chance (0 to 1); None: it is given up."""
    if attempts >= ATTEMPTS_MAX:
        return None
    return min(PAUSE_SECONDS_MAX, FIRST_PAUSE_SECONDS * 2.0 ** (attempts - 1)) * (0.5 + 0.5 * chance)


def is_private(address: str) -> bool:
    """Whether an address is nobody's out there: private, loopback, link-local, or none at all."""
    try:
        return not ipaddress.ip_address(address.strip("[]").partition("%")[0]).is_global
    except ValueError:
        return True


def _moment(moment: Timestamp) -> str:
    return moment.ToDatetime(tzinfo=UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
