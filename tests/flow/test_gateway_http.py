"""What HTTP promises on a gateway alone: refusals as problem details, headers, health, the console, and exit codes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from test_framework.identities import unique
from tests.flow.gateway_process import IDENTITIES, GatewayProcess, environment, gateway_process

pytestmark = pytest.mark.flow

RUN = "01a20f61-31f6-7254-a0c7-b29527f68656"
BODY_BYTES_MAX = 65_536
DEFLATED = {"Content-Type": "application/json", "Content-Encoding": "deflate"}


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    with gateway_process(frame_bytes_max=BODY_BYTES_MAX, start_seconds=1) as process:
        yield process


def bearer(role: str = "runner") -> dict[str, str]:
    return {"Authorization": f"Bearer {IDENTITIES.token('acme', unique('person'), role)}"}


async def refused(gateway: GatewayProcess, method: str, path: str, **options: Any) -> dict[str, Any]:
    """The problem that a request is refused with; its form is checked."""
    async with gateway.request(method, path, **options) as answer:
        assert answer.content_type == "application/problem+json"
        problem: dict[str, Any] = await answer.json()
        assert problem["status"] == answer.status
        assert problem["instance"] == f"urn:uuid:{answer.headers['X-Request-Id']}"
        assert problem["type"] == f"urn:mainspring:reason:{problem['reason']}"
        assert problem["title"] and problem["detail"] and problem["code"]
        return {**problem, "headers": answer.headers}


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "reason"),
    [
        ("GET", "/nowhere", {}, 404, "ROUTE_NOT_FOUND"),
        ("GET", "/v2/runs", {}, 404, "ROUTE_NOT_FOUND"),
        ("GET", "/console/../pyproject.toml", {}, 404, "ROUTE_NOT_FOUND"),
        ("GET", "/console/nothing.js", {}, 404, "ROUTE_NOT_FOUND"),
        ("DELETE", "/v1/runs", {"headers": bearer()}, 405, "METHOD_NOT_ALLOWED"),
        ("POST", f"/v1/runs/{RUN}", {"headers": bearer()}, 405, "METHOD_NOT_ALLOWED"),
        ("HEAD", "/v1/stream", {}, 405, ""),
        ("GET", "/v1/stream", {"headers": bearer()}, 400, "REQUEST_INVALID"),
        ("GET", "/v1/runs", {}, 401, "TOKEN_MISSING"),
        ("GET", "/v1/runs", {"headers": {"Authorization": "Bearer x"}}, 401, "TOKEN_INVALID"),
        ("POST", "/v1/runs", {"headers": bearer("viewer"), "json": {"agent": "a"}}, 403, "ROLE_REQUIRED"),
        ("POST", "/v1/agents", {"headers": bearer(), "json": {}}, 403, "ROLE_REQUIRED"),
        ("GET", "/v1/endpoints", {"headers": bearer()}, 403, "ROLE_REQUIRED"),
        ("GET", "/v1/runs/no-run", {"headers": bearer()}, 404, "RUN_NOT_FOUND"),
        ("GET", "/v1/runs/no-run/events", {"headers": bearer()}, 404, "RUN_NOT_FOUND"),
        ("POST", "/v1/runs/no-run:cancel", {"headers": bearer()}, 404, "RUN_NOT_FOUND"),
        ("POST", f"/v1/runs/{RUN}:pause", {"headers": bearer("viewer")}, 403, "ROLE_REQUIRED"),
        ("POST", f"/v1/runs/{RUN}:resume", {"headers": bearer(), "json": {"reason": "r"}}, 400, "REQUEST_INVALID"),
        ("POST", f"/v1/runs/{RUN}:signal", {"headers": bearer(), "json": {}}, 400, "REQUEST_INVALID"),
        ("POST", f"/v1/runs/{RUN}:fork", {"headers": bearer(), "json": {"seq": 0}}, 400, "REQUEST_INVALID"),
        ("POST", "/v1/runs/no-run:retry", {"headers": bearer()}, 404, "RUN_NOT_FOUND"),
        ("GET", "/v1/runs/no-run:explain", {"headers": bearer("viewer")}, 404, "RUN_NOT_FOUND"),
        ("GET", "/v1/approvals?include_resolved=yes", {"headers": bearer()}, 400, "REQUEST_INVALID"),
        ("GET", "/v1/approvals/no-approval", {"headers": bearer()}, 404, "APPROVAL_NOT_FOUND"),
        ("POST", f"/v1/approvals/{RUN}.4:resolve", {"headers": bearer(), "json": {}}, 400, "REQUEST_INVALID"),
        ("POST", f"/v1/approvals/{RUN}.4:resolve", {"headers": bearer("viewer")}, 403, "ROLE_REQUIRED"),
        ("GET", "/v1/metrics/runs", {"headers": bearer()}, 403, "ROLE_REQUIRED"),
        ("GET", "/v1/metrics/runs?since=today", {"headers": bearer("operator")}, 400, "REQUEST_INVALID"),
        ("POST", f"/v1/runs/{RUN}:dance", {"headers": bearer()}, 404, "ROUTE_NOT_FOUND"),
        ("GET", "/v1/runs?page_size=many", {"headers": bearer()}, 400, "REQUEST_INVALID"),
        ("GET", "/v1/runs?user_id=bob", {"headers": bearer()}, 400, "REQUEST_INVALID"),
        ("POST", "/v1/runs?wait=999", {"headers": bearer(), "json": {"agent": "a"}}, 400, "REQUEST_INVALID"),
        ("POST", "/v1/runs", {"headers": bearer(), "data": "agent=a"}, 415, "MEDIA_TYPE_REFUSED"),
        ("POST", "/v1/runs", {"headers": bearer(), "json": {}}, 400, "REQUEST_INVALID"),
        ("POST", "/v1/runs", {"headers": bearer(), "json": {"agent": "a", "user_id": "bob"}}, 400, "REQUEST_INVALID"),
        ("POST", "/v1/runs", {"headers": bearer(), "json": ["a"]}, 400, "REQUEST_INVALID"),
        ("POST", "/v1/runs", {"headers": bearer(), "json": "x" * BODY_BYTES_MAX}, 413, "PAYLOAD_TOO_LARGE"),
        ("POST", "/v1/runs", {"headers": {**bearer(), **DEFLATED}, "data": b"no deflate"}, 400, "REQUEST_INVALID"),
        ("POST", "/v1/runs", {"headers": bearer(), "json": {"agent": "a"}}, 503, "PEER_UNAVAILABLE"),
    ],
)
async def test_a_refusal_is_a_problem(
    gateway: GatewayProcess, method: str, path: str, options: dict[str, Any], status: int, reason: str
) -> None:
    if method == "HEAD":
        async with gateway.request("HEAD", path) as answer:
            assert answer.status == status
        return
    problem = await refused(gateway, method, path, **options)
    assert (problem["status"], problem["reason"]) == (status, reason)
    assert ("Allow" in problem["headers"]) == (status == 405)
    assert ("WWW-Authenticate" in problem["headers"]) == (status == 401)
    assert ("Retry-After" in problem["headers"]) == (problem["code"] in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"))


async def test_an_unreachable_service_is_named(gateway: GatewayProcess) -> None:
    problem = await refused(gateway, "GET", "/v1/runs", headers=bearer())
    assert (problem["status"], problem["reason"], problem["metadata"]) == (503, "PEER_UNAVAILABLE", {"peer": "state"})


async def test_a_gateway_without_its_peers_lives_but_is_not_ready(gateway: GatewayProcess) -> None:
    async with gateway.request("GET", "/healthz") as answer:
        assert answer.status == 200
    async with gateway.request("GET", "/readyz") as answer:
        assert answer.status == 503
        body = await answer.json()
        assert body["ready"] is False
        assert body["checks"]["follow"] is False
        assert body["checks"]["registry"] is False


async def test_workers_are_told_where_the_services_are() -> None:
    with gateway_process(dispatcher_target="dispatcher.internal:50052") as gateway:
        async with gateway.request("GET", "/v1/endpoints", headers=bearer("operator")) as answer:
            assert answer.status == 200
            endpoints = await answer.json()
        assert endpoints["dispatcher"] == "dispatcher.internal:50052"
        assert set(endpoints) == {"registry", "dispatcher", "execution", "state"}


async def test_every_answer_carries_the_security_headers(gateway: GatewayProcess) -> None:
    for path in ("/", "/healthz", "/v1/runs", "/nowhere"):
        async with gateway.request("GET", path) as answer:
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["X-Frame-Options"] == "DENY"
            assert answer.headers["Referrer-Policy"] == "no-referrer"
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
            assert "unsafe" not in answer.headers["Content-Security-Policy"]
            assert answer.headers["Server"] == "mainspring"


async def test_the_console_needs_nothing_from_elsewhere(gateway: GatewayProcess) -> None:
    async with gateway.request("GET", "/") as answer:
        assert (answer.status, answer.content_type) == (200, "text/html")
        page, tag = await answer.text(), answer.headers["ETag"]
    named = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(named) >= 3
    for path in named:
        assert path.startswith("/console/")
        async with gateway.request("GET", path) as answer:
            assert answer.status == 200
            text = await answer.text()
            assert "innerHTML" not in text and "document.write" not in text and "eval(" not in text
    assert not re.search(r"<script(?![^>]*\ssrc=)", page)
    assert not re.search(r"\son\w+=|style=", page)
    async with gateway.request("GET", "/", headers={"If-None-Match": tag}) as answer:
        assert answer.status == 304


def exit_of(**settings: object) -> tuple[int, str]:
    """The exit code of a gateway that ends by itself, and what it says."""
    command = [sys.executable, "-m", "mainspring_gateway", "serve"]
    ended = subprocess.run(
        command, env=environment(**settings), capture_output=True, text=True, timeout=20, check=False
    )
    return ended.returncode, ended.stderr


def test_every_bad_setting_is_named() -> None:
    code, said = exit_of(auth_secret="short", state_target="nowhere", allowed_origins="app.example", hello_seconds=0)
    assert code == 2
    for name in ("AUTH_SECRET", "STATE_TARGET", "ALLOWED_ORIGINS", "HELLO_SECONDS"):
        assert f"MAINSPRING_{name}" in said


def test_production_refuses_development_secrets() -> None:
    code, said = exit_of(environment="production")
    assert code == 2
    assert "development secret" in said


def test_a_taken_port_is_named(gateway: GatewayProcess) -> None:
    address = gateway.url.removeprefix("http://")
    code, said = exit_of(listen=address)
    assert code == 2
    assert f"{address} is not free" in said
