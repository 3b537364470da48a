"""What runs when nobody calls: the clock of the board, and the copy of the registry's tools. Decides nothing itself."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
from mainspring.v1 import registry_pb2
from mainspring_kit import telemetry
from mainspring_kit.errors import from_rpc_error
from prometheus_client import Counter, Gauge

from mainspring_dispatcher.core.board import Board
from mainspring_dispatcher.core.parts import Counts
from mainspring_dispatcher.peers import Registry

CatalogueCall = grpc.aio.UnaryStreamCall[Any, Any]  # Any: as grpc's own stubs

TICK_SECONDS: Final = 0.1
CATALOGUE_SILENT_SECONDS: Final = 2.0  # the registry beats four times a second
RETRY_SECONDS: Final = 0.5

_UNDER_WAY: Final = Gauge("mainspring_dispatcher_calls_under_way", "Calls that wait or run.")
_WAITING: Final = Gauge("mainspring_dispatcher_calls_waiting", "Calls that wait for a worker.")
_ATTACHED: Final = Gauge("mainspring_dispatcher_workers", "Workers attached.")
_CALLS: Final = Counter("mainspring_dispatcher_calls", "Calls taken.")
_DISPATCHES: Final = Counter("mainspring_dispatcher_dispatches", "Executions handed to workers.")
_LOST: Final = Counter("mainspring_dispatcher_workers_lost", "Workers that left calls unfinished.")
_LATE: Final = Counter("mainspring_dispatcher_results_late", "Results dropped because their dispatch was given up.")


async def keep_time(board: Board) -> None:
    """Tells the board the time, and the metrics what it counts."""
    shown = Counts()
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(TICK_SECONDS)
        board.tick(loop.time())
        shown = _show(board, shown)


async def follow_catalogue(board: Board, registry: Registry) -> None:
    """Keeps the board's knowledge of tools in step with the registry's; a broken stream is opened again."""
    revision, is_broken = 0, False
    while True:
        call = registry.watch(revision)
        fault = "the stream ended"
        try:
            async for frame in _frames(call):
                for change in frame.tools:
                    board.learn(change.tenant_id, change.tool, now=asyncio.get_running_loop().time())
                revision = frame.revision or revision
                board.catalogue_complete = board.catalogue_complete or frame.revision > 0
                is_broken = False
        except TimeoutError:
            fault = f"no beat came for {CATALOGUE_SILENT_SECONDS:g} s"
        except grpc.aio.AioRpcError as error:
            fault = str(from_rpc_error(error))
        finally:
            call.cancel()
        if not is_broken:
            # Each try finds it out again; saying so once is enough. At the start it is an everyday matter.
            level = logging.WARNING if board.catalogue_complete else logging.INFO
            telemetry.logger().log(level, "catalogue_broken", detail=fault)
        is_broken = True
        await asyncio.sleep(RETRY_SECONDS * random.uniform(0.5, 1.0))


async def _frames(call: CatalogueCall) -> AsyncIterator[registry_pb2.WatchCatalogResponse]:
    """The stream's frames until its end; TimeoutError when it is silent for too long."""
    while True:
        async with asyncio.timeout(CATALOGUE_SILENT_SECONDS):
            frame = await call.read()
        if not isinstance(frame, registry_pb2.WatchCatalogResponse):
            return
        yield frame


def _show(board: Board, shown: Counts) -> Counts:
    _UNDER_WAY.set(board.under_way)
    _WAITING.set(board.lines.count)
    _ATTACHED.set(board.attached)
    counts = board.counts
    _CALLS.inc(counts.calls - shown.calls)
    _DISPATCHES.inc(counts.dispatches - shown.dispatches)
    _LOST.inc(counts.workers_lost - shown.workers_lost)
    _LATE.inc(counts.results_late - shown.results_late)
    return Counts(counts.calls, counts.dispatches, counts.workers_lost, counts.results_late)
