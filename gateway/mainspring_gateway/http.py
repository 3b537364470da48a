"""The JSON face of runs, sessions, agents and tools: unpack, call, pack. Owns no rule of what a field may be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import orjson
from aiohttp import hdrs, web
from google.protobuf.descriptor import MethodDescriptor
from mainspring.v1 import execution_pb2
from mainspring_kit.errors import MainspringError, Reason, Violation
from mainspring_kit.identity import Principal, UserExecutionContext, new_id
from mainspring_kit.interceptors import trace_id_of

from mainspring_gateway import access, sse
from mainspring_gateway.core import commands, queries, resources
from mainspring_gateway.engine import started
from mainspring_gateway.gateway import GATEWAY, Gateway
from mainspring_gateway.interceptor import REQUEST_ID

_JSON: Final = ("application/json",)
_DOCUMENTS: Final = ("application/json", "application/yaml", "application/x-yaml", "text/yaml")
_CONTROLS: Final = {"cancel": access.CANCEL_RUN, "pause": access.PAUSE_RUN, "resume": access.RESUME_RUN}
_KEY_HEADER: Final = "Idempotency-Key"
_KEY_CHARACTERS_MAX: Final = 128
_BODY_SECONDS: Final = 30


async def start_run(request: web.Request) -> web.Response:
    """`POST /v1/runs`: 201 once the run is durable; with `?wait=` when it has ended or the time is over."""
    gateway, principal = _admit(request, access.START_RUN)
    gateway.refuse_when_draining()
    seconds = queries.wait_seconds(_query(request))
    fields = commands.decode_object(await _body(request, _JSON))
    start = commands.read_start(fields, idempotency_key=_idempotency_key(request))
    context = _context(request, principal, session_id=start.session_id, run_id=new_id())
    future = gateway.engine.start_run(start, context)
    await asyncio.wait({future})
    result = started(future)
    answer: dict[str, object] = {"run_id": result.run_id, "state": resources.state_text(result.state)}
    if seconds:
        run = await gateway.peers.wait_run(context, run_id=result.run_id, seconds=seconds)
        answer = {**answer, "state": resources.state_text(run.state), "run": resources.run_data(run)}
    response = _json(orjson.dumps(answer), status=200 if result.repeated_key else 201)
    response.headers[hdrs.LOCATION] = f"/v1/runs/{result.run_id}"
    return response


async def list_runs(request: web.Request) -> web.Response:
    """`GET /v1/runs`: a page of the user's runs, newest first."""
    gateway, principal = _admit(request, access.LIST_RUNS)
    question = queries.list_runs_request(_query(request))
    return _json(resources.runs_page(await gateway.peers.list_runs(_context(request, principal), question)))


async def get_run(request: web.Request) -> web.Response:
    """`GET /v1/runs/{run_id}`."""
    gateway, principal = _admit(request, access.GET_RUN)
    run_id = commands.run_id_of(request.match_info["run_id"])
    run = await gateway.peers.get_run(_context(request, principal, run_id=run_id), run_id)
    return _json(orjson.dumps(resources.run_data(run)))


async def read_events(request: web.Request) -> web.StreamResponse:
    """`GET /v1/runs/{run_id}/events`: a page of the log after `after_seq`, or all of it live as a text/event-stream."""
    gateway, principal = _admit(request, access.READ_EVENTS)
    run_id = commands.run_id_of(request.match_info["run_id"])
    context = _context(request, principal, run_id=run_id)
    if sse.MEDIA_TYPE in request.headers.get(hdrs.ACCEPT, ""):
        return await sse.stream_events(request, gateway, principal=principal, context=context)
    after_seq, page_size = queries.read_events_range(_query(request))
    page = await gateway.peers.read_events(context, run_id=run_id, after_seq=after_seq, page_size=page_size)
    return _json(resources.events_page(page))


async def change_run(request: web.Request) -> web.Response:
    """`POST /v1/runs/{run_id}:{verb}`: 202 once the wish is durable; of retry and fork 201 once the new run is.

    An `Idempotency-Key` makes the wish the same as an earlier one under that key.
    """
    run_id, verb = request.match_info["run_id"], request.match_info["verb"]
    change = _CHANGES.get(verb)
    if change is None:
        raise web.HTTPNotFound
    method, act = change
    gateway, principal = _admit(request, method)
    run_id = commands.run_id_of(run_id)
    fields = commands.decode_object((await _body(request, _JSON) if request.body_exists else b"") or b"{}")
    return await act(Wish(gateway, _context(request, principal, run_id=run_id), _idempotency_key(request)), fields)


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody asks of the context's run; `request_id` is empty where the request has no key."""

    gateway: Gateway
    context: UserExecutionContext
    request_id: str


Change = Callable[[Wish, commands.Fields], Awaitable[web.Response]]


async def _control(wish: Wish, fields: commands.Fields, *, verb: str) -> web.Response:
    reason = commands.read_reason(fields, known=() if verb == "resume" else ("reason",))
    run_id = wish.context.run_id
    await wish.gateway.peers.control_run(wish.context, verb, run_id=run_id, reason=reason, request_id=wish.request_id)
    return _json(orjson.dumps({"run_id": run_id}), status=202)


async def _signal(wish: Wish, fields: commands.Fields) -> web.Response:
    signal = commands.read_signal(fields, wish.context.run_id)
    asked = execution_pb2.SignalRunRequest(
        run_id=signal.run_id, name=signal.name, data=signal.data, request_id=wish.request_id
    )
    await wish.gateway.peers.signal_run(wish.context, asked)
    return _json(orjson.dumps({"run_id": signal.run_id}), status=202)


async def _retry(wish: Wish, fields: commands.Fields) -> web.Response:
    commands.read_reason(fields, known=())
    wish.gateway.refuse_when_draining()
    run_id = wish.context.run_id
    made = await wish.gateway.peers.retry_run(wish.context, run_id=run_id, request_id=wish.request_id)
    return _made(made.run_id, made.state)


async def _fork(wish: Wish, fields: commands.Fields) -> web.Response:
    asked = commands.read_fork(fields, wish.context.run_id)
    asked.request_id = wish.request_id
    wish.gateway.refuse_when_draining()
    made = await wish.gateway.peers.fork_run(wish.context, asked)
    return _made(made.run_id, made.state)


def _made(run_id: str, state: int) -> web.Response:
    response = _json(orjson.dumps({"run_id": run_id, "state": resources.state_text(state)}), status=201)
    response.headers[hdrs.LOCATION] = f"/v1/runs/{run_id}"
    return response


async def explain_run(request: web.Request) -> web.Response:
    """`GET /v1/runs/{run_id}:explain`: the run, and why it does not go on."""
    gateway, principal = _admit(request, access.EXPLAIN_RUN)
    run_id = commands.run_id_of(request.match_info["run_id"])
    return _json(resources.explanation(await gateway.peers.explain_run(_context(request, principal), run_id)))


async def list_approvals(request: web.Request) -> web.Response:
    """`GET /v1/approvals`: a page of the approvals that the user may answer, newest first."""
    gateway, principal = _admit(request, access.LIST_APPROVALS)
    question = queries.list_approvals_request(_query(request))
    return _json(resources.approvals_page(await gateway.peers.list_approvals(_context(request, principal), question)))


async def get_approval(request: web.Request) -> web.Response:
    """`GET /v1/approvals/{approval_id}`."""
    gateway, principal = _admit(request, access.GET_APPROVAL)
    approval_id = commands.approval_id_of(request.match_info["approval_id"])
    approval = await gateway.peers.get_approval(_context(request, principal), approval_id)
    return _json(orjson.dumps(resources.approval_data(approval)))


async def resolve_approval(request: web.Request) -> web.Response:
    """`POST /v1/approvals/{approval_id}:resolve`: 202 once the answer is durable; the first one counts."""
    gateway, principal = _admit(request, access.RESOLVE_APPROVAL)
    fields = commands.decode_object(await _body(request, _JSON))
    answer = commands.read_answer(fields, request.match_info["approval_id"])
    asked = execution_pb2.ResolveApprovalRequest(
        approval_id=answer.approval_id,
        decision=answer.decision,
        data=answer.data,
        request_id=_idempotency_key(request),
    )
    resolved = await gateway.peers.resolve_approval(_context(request, principal), asked)
    return _json(orjson.dumps({"approval_id": answer.approval_id, "run_id": resolved.run_id}), status=202)


async def list_run_metrics(request: web.Request) -> web.Response:
    """`GET /v1/metrics/runs`: a page of what the tenant's ended runs cost, newest first."""
    gateway, principal = _admit(request, access.LIST_RUN_METRICS)
    question = queries.list_run_metrics_request(_query(request))
    return _json(resources.metrics_page(await gateway.peers.list_run_metrics(_context(request, principal), question)))


async def list_sessions(request: web.Request) -> web.Response:
    """`GET /v1/sessions`: a page of the user's sessions, newest first."""
    gateway, principal = _admit(request, access.LIST_SESSIONS)
    question = queries.list_sessions_request(_query(request))
    return _json(resources.sessions_page(await gateway.peers.list_sessions(_context(request, principal), question)))


async def register_agent(request: web.Request) -> web.Response:
    """`POST /v1/agents`: registers a specification, YAML or JSON; 201 for a new version, 200 for the same again."""
    gateway, principal = _admit(request, access.REGISTER_AGENT)
    document = await _body(request, _DOCUMENTS)
    answer = await gateway.peers.register_agent(_context(request, principal), document)
    data = {"agent": resources.agent_data(answer.agent), "created": answer.created}
    return _json(orjson.dumps(data), status=201 if answer.created else 200)


async def list_agents(request: web.Request) -> web.Response:
    """`GET /v1/agents`: a page of the tenant's agents, by name."""
    gateway, principal = _admit(request, access.LIST_AGENTS)
    question = queries.list_agents_request(_query(request))
    return _json(resources.agents_page(await gateway.peers.list_agents(_context(request, principal), question)))


async def get_agent(request: web.Request) -> web.Response:
    """`GET /v1/agents/{name}`: its newest version, or `?version=`."""
    gateway, principal = _admit(request, access.GET_AGENT)
    name, version = request.match_info["name"], queries.agent_version(_query(request))
    agent = await gateway.peers.get_agent(_context(request, principal), name=name, version=version)
    return _json(orjson.dumps(resources.agent_data(agent)))


async def list_tools(request: web.Request) -> web.Response:
    """`GET /v1/tools`: a page of the tools that the tenant may call, by name."""
    gateway, principal = _admit(request, access.LIST_TOOLS)
    question = queries.list_tools_request(_query(request))
    return _json(resources.tools_page(await gateway.peers.list_tools(_context(request, principal), question)))


async def put_schedule(request: web.Request) -> web.Response:
    """`POST /v1/schedules`: stores a specification of a schedule, YAML or JSON, in the place of one of its name."""
    gateway, principal = _admit(request, access.PUT_SCHEDULE)
    document = await _body(request, _DOCUMENTS)
    schedule = await gateway.peers.put_schedule(_context(request, principal), document)
    return _json(orjson.dumps(resources.schedule_data(schedule)))


async def list_schedules(request: web.Request) -> web.Response:
    """`GET /v1/schedules`: a page of the tenant's schedules, by name."""
    gateway, principal = _admit(request, access.LIST_SCHEDULES)
    question = queries.list_schedules_request(_query(request))
    return _json(resources.schedules_page(await gateway.peers.list_schedules(_context(request, principal), question)))


async def get_schedule(request: web.Request) -> web.Response:
    """`GET /v1/schedules/{name}`: when it fires next, and what came of the last time."""
    gateway, principal = _admit(request, access.GET_SCHEDULE)
    schedule = await gateway.peers.get_schedule(_context(request, principal), request.match_info["name"])
    return _json(orjson.dumps(resources.schedule_data(schedule)))


async def delete_schedule(request: web.Request) -> web.Response:
    """`DELETE /v1/schedules/{name}`: it fires no more."""
    gateway, principal = _admit(request, access.DELETE_SCHEDULE)
    await gateway.peers.delete_schedule(_context(request, principal), request.match_info["name"])
    return _json(b"{}")


async def list_endpoints(request: web.Request) -> web.Response:
    """`GET /v1/endpoints`: where the services are, for workers and gRPC clients."""
    gateway, _ = _admit(request, access.LIST_INSTANCES)
    settings = gateway.settings
    targets = {
        "registry": settings.registry_target,
        "dispatcher": settings.dispatcher_target,
        "execution": settings.execution_target,
        "state": settings.state_target,
    }
    return _json(orjson.dumps(targets))


async def is_alive(request: web.Request) -> web.Response:
    """`GET /healthz`: the loop turns."""
    return _json(b'{"alive":true}')


async def is_ready(request: web.Request) -> web.Response:
    """`GET /readyz`: 200 when everything that requests need is there, else 503 with what is missing."""
    checks = request.app[GATEWAY].engine.readiness()
    ready = all(checks.values())
    return _json(orjson.dumps({"ready": ready, "checks": checks}), status=200 if ready else 503)


def _admit(request: web.Request, method: MethodDescriptor) -> tuple[Gateway, Principal]:
    """The gateway, and the user who may do this."""
    gateway = request.app[GATEWAY]
    principal = access.authenticate(gateway.verifier, request.headers)
    gateway.strangers.leave(request.protocol)
    access.authorize(principal, method)
    return gateway, principal


def _context(
    request: web.Request, principal: Principal, *, session_id: str = "", run_id: str = ""
) -> UserExecutionContext:
    return access.context_of(
        principal,
        request_id=request[REQUEST_ID],
        session_id=session_id,
        run_id=run_id,
        trace_id=trace_id_of({"traceparent": request.headers.get("traceparent", "")}),
    )


async def _body(request: web.Request, accepted: tuple[str, ...]) -> bytes:
    if request.content_type not in accepted:
        raise MainspringError(
            Reason.MEDIA_TYPE_REFUSED,
            f"A body of type {request.content_type[:64]} is not read here: send {' or '.join(accepted)}.",
            content_type=request.content_type[:64],
            accepted=", ".join(accepted),
        )
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            return await request.read()
    except TimeoutError as error:
        raise _body_broken(f"it did not come within {_BODY_SECONDS} s") from error
    except (web.RequestPayloadError, ConnectionError) as error:
        raise _body_broken("it broke off, or is not encoded as its headers say") from error


def _body_broken(fault: str) -> MainspringError:
    return MainspringError(
        Reason.REQUEST_INVALID,
        f"The body can't be read: {fault}. Send it again.",
        violations=[Violation("body", fault)],
        field="body",
    )


def _idempotency_key(request: web.Request) -> str:
    key = request.headers.get(_KEY_HEADER, "").strip().strip('"')
    if len(key) > _KEY_CHARACTERS_MAX or not key.isprintable():
        description = f"must be text of at most {_KEY_CHARACTERS_MAX} characters"
        raise MainspringError(
            Reason.REQUEST_INVALID,
            f"The header {_KEY_HEADER} {description}.",
            violations=[Violation(_KEY_HEADER, description)],
            field=_KEY_HEADER,
        )
    return key


def _query(request: web.Request) -> queries.Query:
    return {name: request.query.getall(name) for name in request.query}


_CHANGES: Final[Mapping[str, tuple[MethodDescriptor, Change]]] = {
    **{verb: (method, partial(_control, verb=verb)) for verb, method in _CONTROLS.items()},
    "signal": (access.SIGNAL_RUN, _signal),
    "retry": (access.RETRY_RUN, _retry),
    "fork": (access.FORK_RUN, _fork),
}


def _json(body: bytes, *, status: int = 200) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json")
