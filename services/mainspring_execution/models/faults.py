"""What a provider's failure means: one code of ours for each, when to come back, and never a key."""

from __future__ import annotations

import email.utils
import time
from types import ModuleType
from typing import Any, Final

import grpc
from mainspring_kit.errors import MainspringError, Reason

from mainspring_execution.models.endpoint import Endpoint

RETRY_AFTER_SECONDS_MAX: Final = 3_600.0
_DETAIL_CHARACTERS_MAX: Final = 300

_CODES: Final = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.PERMISSION_DENIED,
    402: grpc.StatusCode.PERMISSION_DENIED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    409: grpc.StatusCode.UNAVAILABLE,
    425: grpc.StatusCode.UNAVAILABLE,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
# Faults that come within a stream have a type and no status.
_STATUS_BY_TYPE: Final = {
    "authentication_error": 401,
    "billing_error": 402,
    "invalid_request_error": 400,
    "not_found_error": 404,
    "permission_error": 403,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "request_too_large": 413,
    "timeout_error": 504,
}
_ADVICE: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: "Mend the agent's model settings, tools or instructions.",
    grpc.StatusCode.PERMISSION_DENIED: "Look at the credential and what it may be used for.",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "Ask again later, or raise the account's limits.",
    grpc.StatusCode.UNAVAILABLE: "Ask again; if it goes on, look at the provider's state.",
    grpc.StatusCode.DEADLINE_EXCEEDED: "Ask again; if it goes on, look at the provider's state.",
    grpc.StatusCode.INTERNAL: "Ask again; if it goes on, the server at that address does not speak this protocol.",
}


def model_failed(
    endpoint: Endpoint, code: grpc.StatusCode, *, what: str, step: int, retry_after_seconds: float | None = None
) -> MainspringError:
    """MODEL_FAILED for one model step; `what` follows `The model <name>`."""
    where = f" at {endpoint.base_url}" if endpoint.base_url else ""
    error = MainspringError(
        Reason.MODEL_FAILED,
        f"The model {endpoint.title}{where} {what} {_ADVICE.get(code, '')}".rstrip(),
        code=code,
        retry_after_seconds=retry_after_seconds,
        provider=endpoint.provider,
        model=endpoint.name,
        step=step,
    )
    if retry_after_seconds is not None:
        error.metadata["retry_after_seconds"] = f"{retry_after_seconds:g}"
    return error


def translate(error: Exception, sdk: ModuleType, *, endpoint: Endpoint, step: int, key: str) -> MainspringError:
    """An exception out of a provider's SDK, or of what reads its answers, as the platform's error."""
    import httpx2  # comes with the SDKs, which need not be there

    if isinstance(error, MainspringError):
        return error
    if isinstance(error, sdk.APITimeoutError | httpx2.TimeoutException):
        return model_failed(endpoint, grpc.StatusCode.DEADLINE_EXCEEDED, what="did not answer in time.", step=step)
    if isinstance(error, sdk.APIConnectionError | httpx2.RequestError):
        what = "could not be reached, or its answer broke off."
        return model_failed(endpoint, grpc.StatusCode.UNAVAILABLE, what=what, step=step)
    if not isinstance(error, sdk.APIError):
        what = f"answered what cannot be read ({type(error).__name__})."
        return model_failed(endpoint, grpc.StatusCode.INTERNAL, what=what, step=step)
    status = _status_of(error)
    code = _CODES.get(status, grpc.StatusCode.UNAVAILABLE if status >= 500 else grpc.StatusCode.INVALID_ARGUMENT)
    # Refusals of a key may repeat it.
    detail = "" if code is grpc.StatusCode.PERMISSION_DENIED else _detail_of(error, key=key)
    return model_failed(
        endpoint,
        code,
        what=f"answered {status}{detail}.",
        step=step,
        retry_after_seconds=_retry_after(error) if code in _RETRYABLE else None,
    )


_RETRYABLE: Final = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)


# The SDKs' errors have no base in common: Any, from here on.
def _status_of(error: Any) -> int:
    status = getattr(error, "status_code", None)
    if isinstance(status, int) and status >= 300:
        return status
    body = error.body if isinstance(error.body, dict) else {}
    body = body["error"] if isinstance(body.get("error"), dict) else body
    known = (_STATUS_BY_TYPE.get(str(body.get(field))) for field in ("type", "code"))
    return next((status for status in known if status), 503)


def _detail_of(error: Any, *, key: str) -> str:
    text = " ".join(str(error.message).split())
    if key:
        text = text.replace(key, "…")
    return f": {text[:_DETAIL_CHARACTERS_MAX].rstrip('.')}" if text else ""


def _retry_after(error: Any) -> float | None:
    """What the provider asks for: `retry-after-ms`, or `retry-after` in seconds or as a date."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    milliseconds, seconds = headers.get("retry-after-ms"), headers.get("retry-after")
    try:
        if milliseconds:
            delay = float(milliseconds) / 1e3
        elif seconds and seconds.strip()[:1].isdigit():
            delay = float(seconds)
        elif seconds:
            delay = email.utils.parsedate_to_datetime(seconds).timestamp() - time.time()
        else:
            return None
    except ValueError:
        return None
    return min(max(delay, 0.0), RETRY_AFTER_SECONDS_MAX)
