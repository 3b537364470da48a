"""Errors as RFC 9457 problem details. The table from reason to HTTP status is the contract's own."""

from __future__ import annotations

from typing import Final

import orjson
from mainspring_kit.errors import MainspringError

CONTENT_TYPE: Final = "application/problem+json"


def problem(error: MainspringError, request_id: str) -> bytes:
    """The body of an error's answer; `instance` names this very request, as logs do."""
    body: dict[str, object] = {
        "type": f"urn:mainspring:reason:{error.reason_name}",
        "title": error.reason_name.replace("_", " ").capitalize(),
        "status": error.http_status,
        "detail": error.message,
        "instance": f"urn:uuid:{request_id}",
        "code": error.code.name,
        "reason": error.reason_name,
        "metadata": error.metadata,
    }
    if error.violations:
        body["violations"] = [
            {"field": violation.field, "description": violation.description} for violation in error.violations
        ]
    if error.retry_after_seconds is not None:
        body["retry_after_ms"] = round(error.retry_after_seconds * 1e3)
    return orjson.dumps(body)
