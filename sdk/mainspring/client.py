"""The asynchronous client: starts, follows, reads and controls runs over the gateway's HTTP and WebSocket.

async with Client("http://127.0.0.1:8080", token) as client:
    async for event in client.stream("lookup", {"value": "forty-two"}):
        print(event.seq, event.type, event.data)
"""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

import aiohttp

from mainspring.following import TERMINAL, Backoff, Position

SUBPROTOCOL: Final = "mainspring.v1.json"
ENDED: Final = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"})
# Close codes after which the same socket may be opened again; 4429 and 1013 after a delay like the others.
RETRYABLE_CLOSE: Final = frozenset({1001, 1006, 1011, 1012, 1013, 4008, 4408, 4429})
REQUEST_SECONDS: Final = 30.0
# A text says so in a line of its own, in YAML as in JSON that is laid out; the registry reads all the rest.
_SCHEDULE: Final = re.compile(r"""^\s*[{]?\s*["']?kind["']?\s*:\s*["']?Schedule\b""", re.MULTILINE)

_FRAME_BYTES_MAX: Final = 20 << 20
_HEARTBEAT_SECONDS: Final = 20.0


class ApiError(Exception):
    """The platform refused or failed. `reason` is stable and for programs, the message says what to do next."""

    def __init__(self, message: str, *, code: str, reason: str, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})


class GatewayUnreachableError(ApiError):
    """The gateway can't be reached."""

    def __init__(self, url: str, why: object) -> None:
        super().__init__(
            f"The gateway at {url} can't be reached ({why}). Is it running? Start one here with: mainspring dev",
            code="UNAVAILABLE",
            reason="GATEWAY_UNREACHABLE",
            metadata={"url": url},
        )


@dataclass(frozen=True, slots=True)
class Started:
    """The durable beginning of a run."""

    run_id: str
    state: str


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a run's log, as the page on events describes it; `frame` is all of it. Any: JSON."""

    type: str
    run_id: str
    seq: int
    data: Mapping[str, Any]
    frame: Mapping[str, Any] = field(repr=False)

    @property
    def is_terminal(self) -> bool:
        """Whether it is the run's last."""
        return self.type in TERMINAL


@dataclass(frozen=True, slots=True)
class Delta:
    """Unfinished text of a model step: it goes behind the step's first `offset` characters; 0: the text begins."""

    run_id: str
    step: int
    offset: int
    text: str


# Is given unfinished text as it comes.
OnText = Callable[[Delta], None]


class Client:
    """One user's access to one gateway. Use it as an async context manager, or close it."""

    def __init__(self, url: str, token: str) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            await self._session.close()

    async def start(self, agent: str, run_input: Any = None, **options: str | int) -> Started:
        """Starts a run; durable when this returns.

        Options: session_id, idempotency_key, alias, version, priority, start_time (as RFC 3339 writes it).
        """
        answer = await self.request("POST", "/v1/runs", body=_start(agent, run_input, options=options))
        return Started(answer["run_id"], answer["state"])

    async def stream(
        self,
        agent: str,
        run_input: Any = None,
        *,
        on_text: OnText | None = None,
        with_sub_runs: bool = False,
        **options: str | int,
    ) -> AsyncGenerator[Event, None]:
        """Starts a run and yields its events as they become durable, to the terminal one.

        A connection that breaks is opened again and the log goes on where it was; the start is never made twice.
        `on_text` is given what the model says while it says it; `with_sub_runs` yields also the events of runs below.
        """
        options.setdefault("idempotency_key", uuid.uuid4().hex)
        frame = {"op": "start", "id": "start", **_start(agent, run_input, options=options)}
        position = Position(below={} if with_sub_runs else None)
        async with aclosing(self._follow(frame, position, on_text=on_text)) as events:
            async for event in events:
                yield event

    async def follow(
        self, run_id: str, *, after_seq: int = 0, on_text: OnText | None = None, with_sub_runs: bool = False
    ) -> AsyncGenerator[Event, None]:
        """Yields a run's events after a seq, those that are there and those to come, to the terminal one."""
        position = Position(run_id, after_seq, {} if with_sub_runs else None)
        async with aclosing(self._follow(position.frames()[0], position, on_text=on_text)) as events:
            async for event in events:
                yield event

    async def run(self, agent: str, run_input: Any = None, **options: Any) -> Event:
        """Starts a run and returns its terminal event."""
        async with aclosing(self.stream(agent, run_input, **options)) as events:
            async for event in events:
                if event.is_terminal:
                    return event
        raise ApiError("The log ended without a terminal event.", code="INTERNAL", reason="LOG_INCOMPLETE")

    async def get_run(self, run_id: str) -> dict[str, Any]:
        """A run as it stands."""
        return await self.request("GET", f"/v1/runs/{run_id}")

    async def list_runs(self, **query: str) -> dict[str, Any]:
        """A page of the user's runs, newest first. Query: session_id, state, agent, page_size, page_token."""
        return await self.request("GET", "/v1/runs", query=query)

    async def events(self, run_id: str, *, after_seq: int = 0) -> AsyncGenerator[Event, None]:
        """The events that are in a run's log now, after a seq."""
        while True:
            page = await self.request("GET", f"/v1/runs/{run_id}/events", query={"after_seq": str(after_seq)})
            for frame in page["events"]:
                yield _event(frame)
                after_seq = frame["seq"]
            if not page["events"] or after_seq >= page["last_seq"]:
                return

    async def cancel(self, run_id: str, *, reason: str = "") -> dict[str, Any]:
        """Asks for the end of a run: durable when this returns, carried out soon after."""
        return await self.request("POST", f"/v1/runs/{run_id}:cancel", body={"reason": reason} if reason else {})

    async def pause(self, run_id: str, *, reason: str = "") -> dict[str, Any]:
        """Asks a run to stand still between two steps: durable when this returns."""
        return await self.request("POST", f"/v1/runs/{run_id}:pause", body={"reason": reason} if reason else {})

    async def resume(self, run_id: str) -> dict[str, Any]:
        """Lets a paused run go on: durable when this returns."""
        return await self.request("POST", f"/v1/runs/{run_id}:resume", body={})

    async def signal(self, run_id: str, name: str, *, data: Any = None) -> dict[str, Any]:
        """Sends a run a named signal: durable when this returns, and kept until the run takes it. Any: JSON."""
        return await self.request("POST", f"/v1/runs/{run_id}:signal", body={"name": name, "data": data})

    async def retry(self, run_id: str) -> Started:
        """Starts an ended run again, as a new one."""
        answer = await self.request("POST", f"/v1/runs/{run_id}:retry", body={})
        return Started(answer["run_id"], answer["state"])

    async def fork(self, run_id: str, seq: int, **options: str) -> Started:
        """Starts a run from an event of another: what was done by then is taken over. Options: session_id, version."""
        body = {"seq": seq, **{name: value for name, value in options.items() if value}}
        answer = await self.request("POST", f"/v1/runs/{run_id}:fork", body=body)
        return Started(answer["run_id"], answer["state"])

    async def explain(self, run_id: str) -> dict[str, Any]:
        """A run as it stands, and why it does not go on: `run`, `holds`, `executor_id`."""
        return await self.request("GET", f"/v1/runs/{run_id}:explain")

    async def list_approvals(self, **query: str) -> dict[str, Any]:
        """A page of open approvals that the user may answer. Query: run_id, include_resolved, page_size, page_token."""
        return await self.request("GET", "/v1/approvals", query=query)

    async def resolve(self, approval_id: str, decision: str, *, data: Any = None) -> dict[str, Any]:
        """Answers an approval with `allow` or `deny`; the first answer counts. Any: JSON that matches its schema."""
        body = {"decision": decision, "data": data}
        return await self.request("POST", f"/v1/approvals/{approval_id}:resolve", body=body)

    async def apply(self, document: Mapping[str, Any] | str) -> dict[str, Any]:
        """Registers an agent from its specification, an object or a YAML or JSON text; the same again changes nothing.

        A specification of `kind: Schedule` is stored as a schedule. A text is read by the registry alone, which is
        stricter than YAML libraries are.
        """
        if isinstance(document, str):
            is_schedule = _SCHEDULE.search(document) is not None
        else:
            is_schedule = document.get("kind") == "Schedule"
        return await self.request("POST", "/v1/schedules" if is_schedule else "/v1/agents", body=document)

    async def request(
        self, method: str, path: str, *, body: Any = None, query: Mapping[str, str] | Sequence[tuple[str, str]] = ()
    ) -> dict[str, Any]:
        """One HTTP call of the gateway's; ApiError for anything but success. A body that is text is YAML. Any: JSON."""
        content: dict[str, Any] = {"json": body}
        if isinstance(body, str):
            content = {"data": body.encode(), "headers": {"Content-Type": "application/yaml"}}
        try:
            async with self._open().request(method, self._url + path, params=query, **content) as answer:
                text = await answer.text()
                if answer.status < 400:
                    found: dict[str, Any] = json.loads(text)
                    return found
                raise _problem(answer.status, text)
        except (aiohttp.ClientConnectionError, TimeoutError) as error:
            raise GatewayUnreachableError(self._url, str(error) or type(error).__name__) from error

    async def _follow(
        self, first: Mapping[str, Any], position: Position, *, on_text: OnText | None
    ) -> AsyncGenerator[Event, None]:
        """Sends `first` until a run is known, from then on follows the run from its position."""
        backoff = Backoff()
        while True:
            opening = [first] if not position.run_id else position.frames()
            after_seq = position.after_seq
            try:
                async with aclosing(self._frames(opening)) as frames:
                    async for frame in frames:
                        backoff.reset()
                        match frame["op"]:
                            case "error" if not _is_about_branch(frame):
                                raise _refusal(frame)
                            case "delta" if on_text is not None and position.shows(frame["run_id"]):
                                on_text(Delta(frame["run_id"], frame["step"], frame["offset"], frame["text"]))
                            case "started":
                                position.run_id = frame["run_id"]
                            case "event" if position.passes(frame):
                                event = _event(frame)
                                yield event
                                if event.is_terminal and event.run_id == position.run_id:
                                    return
                            case "caught_up" if frame["run_id"] == position.run_id and position.after_seq == after_seq:
                                if await self._has_ended(position):
                                    return
            except GatewayUnreachableError:
                if backoff.is_exhausted():
                    raise
            await asyncio.sleep(backoff.next_seconds())

    async def _has_ended(self, position: Position) -> bool:
        """Whether a log that was followed from its end, or from beyond it, has nothing more to come."""
        run = await self.get_run(position.run_id)
        return run["state"] in ENDED and run["last_seq"] <= position.after_seq

    async def _frames(self, first: Sequence[Mapping[str, Any]]) -> AsyncGenerator[dict[str, Any], None]:
        """Opens a socket, sends frames and yields what comes, until a close after which one may come back."""
        # A heartbeat notices a connection that died in silence; the gateway's own pings come less often.
        try:
            async with self._open().ws_connect(
                f"{self._url}/v1/stream",
                protocols=(SUBPROTOCOL,),
                heartbeat=_HEARTBEAT_SECONDS,
                max_msg_size=_FRAME_BYTES_MAX,
            ) as socket:
                for opening in first:
                    await socket.send_json(opening)
                async for message in socket:
                    if message.type is aiohttp.WSMsgType.TEXT:
                        yield json.loads(message.data)
                if socket.close_code is not None and socket.close_code not in RETRYABLE_CLOSE:
                    raise _closed(socket.close_code)
        except aiohttp.WSServerHandshakeError as error:
            raise _problem(error.status, error.message) from error
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            raise GatewayUnreachableError(self._url, str(error) or type(error).__name__) from error

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers, timeout=aiohttp.ClientTimeout(total=REQUEST_SECONDS)
            )
        return self._session


def _start(agent: str, run_input: Any, *, options: Mapping[str, str | int]) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if value != ""}
    return {"agent": agent, "input": {} if run_input is None else run_input, **given}


def _is_about_branch(frame: Mapping[str, Any]) -> bool:
    """Whether an error is of a run below the followed one, which goes on without it."""
    queue = (frame.get("metadata") or {}).get("queue")
    return frame.get("id") == "branch" or ("id" not in frame and queue == "followed_runs")


def _event(frame: dict[str, Any]) -> Event:
    return Event(frame["type"], frame["run_id"], frame["seq"], frame["data"], frame)


def _refusal(frame: Mapping[str, Any]) -> ApiError:
    return ApiError(
        frame.get("message", ""), code=frame["code"], reason=frame["reason"], metadata=frame.get("metadata")
    )


def _closed(close_code: int) -> ApiError:
    reason = {4401: "TOKEN_INVALID", 4403: "ROLE_REQUIRED", 4400: "REQUEST_INVALID"}.get(close_code, "SOCKET_CLOSED")
    return ApiError(f"The gateway closed the socket with {close_code}.", code="ABORTED", reason=reason)


def _problem(status: int, text: str) -> ApiError:
    """An RFC 9457 body, or whatever a proxy in between has said."""
    try:
        found = json.loads(text)
    except ValueError:
        found = {}
    if not isinstance(found, dict) or "reason" not in found:
        return ApiError(f"HTTP {status}: {text[:500].strip()}", code=str(status), reason=f"HTTP_{status}")
    message = found.get("detail") or found.get("title") or f"HTTP {status}"
    violations = [f"{v.get('field')}: {v.get('description')}" for v in found.get("violations") or ()]
    return ApiError(
        "\n  ".join([message, *violations]),
        code=found.get("code", str(status)),
        reason=found["reason"],
        metadata=found.get("metadata"),
    )
