"""The gateway's HTTP attacked with wrong paths, queries, headers and bodies, and with bytes that are no HTTP."""

from __future__ import annotations

import http.client
import io
import json
import socket
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test_framework.agents import echo_agent
from test_framework.identities import make_context
from test_framework.loop_thread import LoopThread
from test_framework.stack import Stack
from test_framework.user import User
from tests.fuzz.attacker import DOCUMENTS
from tests.fuzz.conftest import AT_A_TIME, Attack
from tests.fuzz.messages import JSONS, TEXTS
from tests.fuzz.witness import Witness

pytestmark = [pytest.mark.fuzz, pytest.mark.real_services, pytest.mark.security]

SECONDS = 60.0
# After so long nothing more is expected: what was sent asks for nothing yet.
QUIET_SECONDS = 2.0
UNANSWERED_MAX = 0.1
CHECK_SECONDS = 120.0
# Not built yet, or not there at the moment. Everything else from 500 on is a fault.
SERVER_ERRORS = {501, 503}
# Status -> why it carries no problem.
WITHOUT_A_PROBLEM = {417: "an expectation that aiohttp does not know is refused by it before anything of ours runs"}
METHODS = ("GET", "GET", "GET", "POST", "POST", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "BREW", "get")
PATHS = (
    *("/", "/console/console.js", "/console/{word}", "/healthz", "/readyz", "/v1/stream", "/v1/runs", "/v1/runs/{run}"),
    *("/v1/runs/{run}/events", "/v1/runs/{run}:cancel", "/v1/runs/{run}:{word}", "/v1/sessions", "/v1/agents"),
    *("/v1/runs/{run}:explain", "/v1/approvals", "/v1/approvals/{run}.3", "/v1/approvals/{word}", "/v1/metrics/runs"),
    *(
        "/v1/agents/{word}",
        "/v1/agents/echo",
        "/v1/tools",
        "/v1/endpoints",
        "/v1/{word}",
        "/{word}",
        "*",
        "//",
        "{word}",
    ),
)
# What changes something: method, path and body.
RIGHT = (
    ("POST", "/v1/runs", b'{"agent":"echo","input":{}}'),
    ("POST", "/v1/runs/{run}:cancel", b'{"reason":"enough"}'),
    ("POST", "/v1/runs/{run}:pause", b"{}"),
    ("POST", "/v1/runs/{run}:resume", b""),
    ("POST", "/v1/runs/{run}:signal", b'{"name":"go","data":[1]}'),
    ("POST", "/v1/runs/{run}:retry", b""),
    ("POST", "/v1/runs/{run}:fork", b'{"seq":1}'),
    ("POST", "/v1/approvals/{run}.3:resolve", b'{"decision":"allow"}'),
    ("POST", "/v1/agents", DOCUMENTS[1]),
    ("GET", "/v1/runs/{run}/events", b""),
)
QUERIES = ("page_size", "page_token", "after_seq", "wait", "version", "session_id", "agent", "state", "ticket", "x", "")
TYPES = ("application/json", "application/yaml", "text/plain", "", "application/json; charset=utf-9", "\xff")
HEADERS = (
    "Accept",
    "Last-Event-ID",
    "Idempotency-Key",
    "traceparent",
    "Origin",
    "Expect",
    "Content-Encoding",
    "Upgrade",
)
VALUES = (
    "text/event-stream",
    "5",
    "-1",
    "00-" + "f" * 32 + "-" + "f" * 16 + "-01",
    "gzip",
    "100-continue",
    "websocket",
)
ENDS = (*[b""] * 10, b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 100, *[b""] * 10)

Draw = Callable[[st.SearchStrategy[Any]], Any]  # Any: what a strategy makes


def requests(credentials: list[str], run_ids: list[str]) -> st.SearchStrategy[bytes]:
    """Requests as bytes: from right ones to those that are none."""
    words = st.one_of(
        st.sampled_from(TEXTS), st.sampled_from(("echo", "nobody", "pause", "%", "%zz", "%00", "..", ":"))
    )
    written = words.map(lambda word: quote(word[:3_000], safe="%"))

    odd = st.tuples(st.sampled_from(METHODS), st.sampled_from(PATHS), st.none())

    @st.composite
    def made(draw: Draw) -> bytes:
        run_id = draw(st.one_of(st.sampled_from(run_ids), written))
        method, path, right_body = draw(st.one_of(st.sampled_from(RIGHT), odd))
        path = path.replace("{run}", run_id).replace("{word}", draw(written))
        query = "&".join(f"{draw(st.sampled_from(QUERIES))}={draw(written)}" for _ in range(draw(st.integers(0, 2))))
        body = right_body if right_body is not None else draw(st.sampled_from((*JSONS, *DOCUMENTS, b"")))
        headers = {"Host": "here", "Connection": "close", "Authorization": draw(st.sampled_from(credentials))}
        if body:
            headers["Content-Type"] = draw(st.sampled_from(TYPES))
            headers["Content-Length"] = str(len(body))
        for _ in range(draw(st.integers(0, 2))):
            headers[draw(st.sampled_from(HEADERS))] = draw(st.one_of(st.sampled_from(VALUES), written))
        fate = draw(st.integers(0, 24))
        if fate == 11 and body:
            headers["Content-Length"] = draw(st.sampled_from(("-1", "1", "x", "1e9")))
        elif fate == 12:
            headers["Transfer-Encoding"] = draw(st.sampled_from(("chunked", "gzip", "x")))
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value)
        target = f"{path}?{query}" if query else path
        head = f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1", "replace")
        request: bytes = head + body + draw(st.sampled_from(ENDS))
        return request if fate != 13 else _overwritten(request, draw(st.integers(0, 400)), draw(st.binary(max_size=9)))

    return st.one_of(made(), made(), made(), made(), made(), made(), st.binary(max_size=200))


def _overwritten(data: bytes, place: int, noise: bytes) -> bytes:
    return data[:place] + noise + data[place + len(noise) :]


class _Answer(io.BytesIO):
    def makefile(self, *_: object) -> io.BytesIO:
        """What http.client asks of a socket."""
        return self


def ask(gateway: str, request: bytes) -> tuple[int, str]:
    """Sends bytes; returns the status, 0 where no answer came, and what is wrong with the answer."""
    address = urlsplit(gateway)
    with socket.create_connection((address.hostname, address.port), SECONDS) as connection:
        connection.sendall(request)
        raw = _read(connection)
    if not raw:
        return 0, ""
    answer = http.client.HTTPResponse(_Answer(raw), method=request.partition(b" ")[0].decode("latin-1"))  # type: ignore[arg-type]  # no socket
    answer.begin()
    if answer.status < 400 or request.startswith(b"HEAD "):
        return answer.status, ""
    if answer.status in WITHOUT_A_PROBLEM:
        return answer.status, ""
    if answer.headers.get_content_type() != "application/problem+json":
        return answer.status, f"{answer.status} without a problem: {raw[:300]!r}"
    problem = json.loads(answer.read())
    is_fault = answer.status >= 500 and answer.status not in SERVER_ERRORS
    is_fault |= problem["code"] in ("INTERNAL", "UNKNOWN", "") or not problem["reason"] or "bystander" in str(problem)
    return answer.status, f"{problem}" if is_fault else ""


def _read(connection: socket.socket) -> bytes:
    """An answer to its end; of an event stream or a WebSocket, its head. A request that is not whole gets none."""
    raw = b""
    connection.settimeout(QUIET_SECONDS)
    try:
        while more := connection.recv(1 << 16):
            raw += more
            if b"\r\n\r\n" in raw and (b"text/event-stream" in raw or raw.startswith(b"HTTP/1.1 101")):
                break
    except (ConnectionResetError, TimeoutError):
        pass
    return raw


def test_an_attacked_http_server_answers_with_a_reason_and_nothing_is_left_behind(
    fuzz_stack: Stack, fuzz_loop: LoopThread, attacks: Callable[[Attack], Attack], tell: Callable[[str], None]
) -> None:
    witness = fuzz_loop.run(Witness.begin(fuzz_stack))
    context = make_context()

    async def begin() -> str:
        async with User(fuzz_stack, context) as user:
            await user.register(echo_agent())
            async with user.stream() as socket:
                run_id: str = (await socket.run("echo", {"value": 1}))[0]["run_id"]
        return run_id

    tokens = [
        fuzz_stack.identities.token(context.tenant_id, context.user_id, role)
        for role in ("runner", "runner", "operator", "operator", "viewer")
    ]
    credentials = [*(f"Bearer {token}" for token in tokens), "", "Bearer x", "Basic eDp4", f"bearer  {tokens[0]}"]
    run_ids = [fuzz_loop.run(begin()), witness.bystander.run_id]
    statuses: Counter[int] = Counter()

    @attacks
    @given(st.lists(requests(credentials, run_ids), min_size=AT_A_TIME, max_size=AT_A_TIME))
    def attack(batch: list[bytes]) -> None:
        answers = list(threads.map(lambda request: ask(fuzz_stack.gateway, request), batch))
        assert [fault for _, fault in answers if fault] == []
        statuses.update(status for status, _ in answers)

    with ThreadPoolExecutor(AT_A_TIME) as threads:
        attack()
    assert statuses[0] <= UNANSWERED_MAX * statuses.total(), statuses
    tell(f"{dict(sorted(statuses.items()))}; {fuzz_loop.run(witness.check(Counter()), CHECK_SECONDS)}")
