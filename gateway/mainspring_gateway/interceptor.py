"""What happens around every HTTP request: its id, one log line, its errors as problem details, and security headers."""

from __future__ import annotations

import logging
import time
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler
from mainspring_kit import telemetry
from mainspring_kit.errors import MainspringError, Reason
from mainspring_kit.identity import new_id

from mainspring_gateway.core.problems import CONTENT_TYPE, problem
from mainspring_gateway.gateway import BEGUN

# The request's key of its id.
REQUEST_ID: Final = "mainspring_request_id"

# Asked every few seconds by whoever watches the process: not worth a line each.
_PROBES: Final = frozenset({"/healthz", "/readyz"})
_CLOSE_INTERNAL: Final = 1011
_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}


@web.middleware
async def intercept(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answers whatever is raised with a problem that names the request's id; a fault of ours says no more than that."""
    request_id = request[REQUEST_ID] = new_id()
    begin = time.monotonic()
    try:
        response = await handler(request)
    except MainspringError as error:
        response = _problem(error, request_id)
    except web.HTTPException as error:
        response = _problem(_translate(error, request), request_id)
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
    except Exception as error:  # the interceptor: what nobody foresaw is logged and answered as INTERNAL
        telemetry.logger().error("request_failed", request_id=request_id, exc_info=error)
        response = request[BEGUN] if BEGUN in request else _problem(_fault(request_id), request_id)
    if isinstance(response, web.WebSocketResponse):
        # It has logged its opening and end; still open here, it was ended by a fault.
        await response.close(code=_CLOSE_INTERNAL, message=b"INTERNAL", drain=False)
        return response
    resource = request.match_info.route.resource
    route = resource.canonical if resource is not None else ""
    seconds = time.monotonic() - begin
    label = f"{request.method} {route}" if route else "unknown"
    telemetry.RPC_COUNT.labels(label, str(response.status)).inc()
    telemetry.RPC_SECONDS.labels(label).observe(seconds)
    telemetry.logger().log(
        logging.DEBUG if route in _PROBES else logging.INFO,
        "request_served",
        method=request.method,
        route=route,
        status=response.status,
        duration_ms=round(seconds * 1e3, 3),
        request_id=request_id,
    )
    return response


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Adds what every answer carries, before its headers are sent; a handler's own value stays."""
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers["Server"] = "mainspring"
    if REQUEST_ID in request:
        response.headers["X-Request-Id"] = request[REQUEST_ID]


def _problem(error: MainspringError, request_id: str) -> web.StreamResponse:
    response = web.Response(body=problem(error, request_id), status=error.http_status, content_type=CONTENT_TYPE)
    if error.http_status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after_seconds is not None:
        response.headers["Retry-After"] = str(max(1, round(error.retry_after_seconds)))
    return response


def _translate(error: web.HTTPException, request: web.Request) -> MainspringError:
    """What aiohttp itself refuses, as an error of the table."""
    if isinstance(error, web.HTTPNotFound):
        return MainspringError(
            Reason.ROUTE_NOT_FOUND,
            f"There is nothing at {request.path[:256]}: check the path.",
            path=request.path[:256],
        )
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return MainspringError(
            Reason.METHOD_NOT_ALLOWED,
            f"{request.path[:256]} does not take {request.method[:16]}: use {allowed}.",
            method=request.method[:16],
            allowed=allowed,
        )
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        limit = request.client_max_size
        return MainspringError(
            Reason.PAYLOAD_TOO_LARGE,
            f"The body is larger than {limit} bytes: send less.",
            field="body",
            bytes=request.content_length or 0,
            limit=limit,
        )
    return MainspringError(
        Reason.REQUEST_INVALID, f"The request can't be read: {error.text or error.reason}.", field=""
    )


def _fault(request_id: str) -> MainspringError:
    return MainspringError(
        Reason.INTERNAL,
        f"A fault of ours, logged under the request id {request_id}: report it with that id.",
        request_id=request_id,
    )
