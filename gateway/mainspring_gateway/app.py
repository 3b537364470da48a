"""The routes of the gateway."""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Handler

from mainspring_gateway import console, http, interceptor, socket
from mainspring_gateway.gateway import GATEWAY, Gateway


def make_app(gateway: Gateway) -> web.Application:
    """The HTTP application over a running gateway."""
    app = web.Application(middlewares=[interceptor.intercept], client_max_size=gateway.settings.frame_bytes_max)
    app[GATEWAY] = gateway
    app[console.FILES] = console.read_files()
    app.on_response_prepare.append(interceptor.add_headers)
    app.add_routes(
        [
            web.get("/", console.show_file),
            web.get("/console/{name}", console.show_file),
            _get("/healthz", http.is_alive),
            _get("/readyz", http.is_ready),
            _get("/v1/stream", socket.stream),
            web.post("/v1/runs", http.start_run),
            _get("/v1/runs", http.list_runs),
            _get("/v1/runs/{run_id}:explain", http.explain_run),
            _get("/v1/runs/{run_id}", http.get_run),
            _get("/v1/runs/{run_id}/events", http.read_events),
            web.post("/v1/runs/{run_id}:{verb}", http.change_run),
            _get("/v1/approvals", http.list_approvals),
            _get("/v1/approvals/{approval_id}", http.get_approval),
            web.post("/v1/approvals/{approval_id}:resolve", http.resolve_approval),
            _get("/v1/metrics/runs", http.list_run_metrics),
            _get("/v1/sessions", http.list_sessions),
            web.post("/v1/agents", http.register_agent),
            _get("/v1/agents", http.list_agents),
            _get("/v1/agents/{name}", http.get_agent),
            _get("/v1/tools", http.list_tools),
            web.post("/v1/schedules", http.put_schedule),
            _get("/v1/schedules", http.list_schedules),
            _get("/v1/schedules/{name}", http.get_schedule),
            web.delete("/v1/schedules/{name}", http.delete_schedule),
            _get("/v1/endpoints", http.list_endpoints),
        ]
    )
    return app


def _get(path: str, handler: Handler) -> web.RouteDef:
    """A route that only GET takes: a HEAD of a stream would be one, too."""
    return web.get(path, handler, allow_head=False)
