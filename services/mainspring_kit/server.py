"""How a process starts, serves, tells its health, drains and ends. Knows no service by name."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from mainspring_kit import telemetry
from mainspring_kit.channel import MESSAGE_BYTES_MAX, METADATA_BYTES_MAX
from mainspring_kit.config import ServiceSettings, Settings, SettingsError, load
from mainspring_kit.errors import MainspringError
from mainspring_kit.identity import TokenVerifier
from mainspring_kit.interceptors import Guard
from mainspring_kit.tasks import background

EXIT_FAILED: Final = 1
EXIT_SETTINGS: Final = 2

_READINESS_CHECK_SECONDS: Final = 0.25
_SERVER_OPTIONS: Final = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_metadata_size", METADATA_BYTES_MAX),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),  # half of what callers keep to
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
]


@dataclass(frozen=True, slots=True)
class Service:
    """A gRPC service to serve: its descriptor, the generated function that adds it, and the servicer."""

    descriptor: ServiceDescriptor
    add_to_server: Callable[[Any, Any], None]  # Any: generated code types servicer and server differently per service
    servicer: object


def run(
    name: str, settings_class: type[Settings], *, main: Callable[[Settings, asyncio.Event], Coroutine[Any, Any, None]]
) -> int:
    """Runs a process to its end and returns its exit code: 0 after a signal, 2 for bad settings, 1 when it failed.

    `main` gets the settings and an event that is set when the process shall stop.
    """
    try:
        settings = load(settings_class)
        telemetry.configure(name, settings.instance_id, level=settings.log_level)
        if isinstance(settings, ServiceSettings) and settings.metrics_listen:
            telemetry.serve_metrics(settings.metrics_listen)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_supervise(settings, main))
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_SETTINGS
    except MainspringError as error:
        telemetry.logger().error("process_failed", detail=str(error))
        return EXIT_FAILED
    except Exception as error:  # the root of the process: whatever ended it is logged and becomes the exit code
        telemetry.logger().error("process_failed", exc_info=error)
        return EXIT_FAILED
    telemetry.logger().info("process_stopped")
    return 0


@asynccontextmanager
async def serving(
    settings: ServiceSettings,
    services: Sequence[Service],
    *,
    ready: Callable[[], bool] = lambda: True,
) -> AsyncIterator[int]:
    """Serves gRPC while the block runs and yields the port. At its end: not ready, no new calls, drain, closed.

    `ready` is asked four times a second; its answer is the health of `readiness`. `liveness` is the loop's own.
    """
    verifier = TokenVerifier(settings.auth_secret.get_secret_value(), settings.service_secret.get_secret_value())
    descriptors = [service.descriptor for service in services]
    server = grpc.aio.server(interceptors=[Guard(descriptors, verifier)], options=_SERVER_OPTIONS)
    for service in services:
        service.add_to_server(service.servicer, server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    names = [*(descriptor.full_name for descriptor in descriptors), health.SERVICE_NAME, reflection.SERVICE_NAME]
    reflection.enable_server_reflection(names, server)
    try:
        port = server.add_insecure_port(settings.listen)
    except RuntimeError as error:
        raise SettingsError(f"{settings.listen} is not free: choose another MAINSPRING_LISTEN.") from error
    await server.start()
    telemetry.logger().info("server_started", address=settings.listen, port=port)
    settle_heap()
    try:
        async with background(_report_readiness(checks, ["readiness", *names], ready=ready)):
            await checks.set("liveness", health_pb2.HealthCheckResponse.SERVING)
            yield port
    finally:
        await checks.enter_graceful_shutdown()
        await server.stop(settings.drain_seconds)


def settle_heap() -> None:
    """What stands at start is never looked at again; runs under way not many times before one of them has ended."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


async def _report_readiness(checks: Any, names: Sequence[str], *, ready: Callable[[], bool]) -> None:
    """Any: the health package ships no types."""
    known: bool | None = None
    while True:
        if (now := ready()) is not known:
            known = now
            status = health_pb2.HealthCheckResponse.SERVING if now else health_pb2.HealthCheckResponse.NOT_SERVING
            for name in ("", *names):
                await checks.set(name, status)
            telemetry.logger().info("readiness_changed", ready=now)
        await asyncio.sleep(_READINESS_CHECK_SECONDS)


async def _supervise(settings: Settings, main: Callable[[Settings, asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if settings.parent_fd >= 0:
        loop.add_reader(settings.parent_fd, _on_parent_word, settings.parent_fd, stop)
    await main(settings, stop)


def _on_parent_word(fd: int, stop: asyncio.Event) -> None:
    """The pipe to the parent became readable: at its end of file the parent is gone."""
    if not os.read(fd, 64):
        asyncio.get_running_loop().remove_reader(fd)
        telemetry.logger().warning("parent_gone")
        stop.set()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
