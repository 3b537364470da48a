"""Logs as JSON lines and the metrics of calls. Never payloads or secrets; metric labels are bounded."""

from __future__ import annotations

import logging
import sys
from typing import Final

import orjson
import structlog
from prometheus_client import Counter, Histogram, start_http_server

from mainspring_kit.config import split_address

RPC_COUNT: Final = Counter("mainspring_rpc", "Calls served, by method and gRPC code.", ["method", "code"])
RPC_SECONDS: Final = Histogram(
    "mainspring_rpc_seconds",
    "How long calls took, by method.",
    ["method"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)


def configure(name: str, instance_id: str, *, level: str) -> None:
    """Sends all logs of the process, structlog's and the libraries', to standard error as JSON lines."""
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer(serializer=_to_json)],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=name, instance=instance_id)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processor=structlog.processors.JSONRenderer(serializer=_to_json), foreign_pre_chain=shared
        )
    )
    logging.basicConfig(handlers=[handler], level=max(number, logging.WARNING), force=True)


def logger() -> structlog.typing.FilteringBoundLogger:
    """The process's logger: `logger().info("noun_verb", id=…)`."""
    bound: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return bound


def serve_metrics(address: str) -> None:
    """Serves Prometheus metrics at `http://address/metrics` from a thread of its own."""
    host, port = split_address(address)
    start_http_server(port, addr=host)


def _to_json(event: object, **_: object) -> str:
    return orjson.dumps(event, default=str).decode()
