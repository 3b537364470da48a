"""What runs when nobody calls: the clock of the board, and the copy of the registry's tools. Decides nothing itself."""

from __future__ import annotations

import asyncio
import random
from typing import Final

import grpc
from mainspring.v1 import registry_pb2
from mainspring_kit import telemetry
from mainspring_kit.errors import from_rpc_error
from mainspring_kit.tasks import raise_if_cancelled
from prometheus_client import Counter, Gauge

from mainspring_dispatcher.core.board import Board
from mainspring_dispatcher.core.parts import Counts
from mainspring_dispatcher.peers import Registry

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
    loop = asyncio.get_running_loop()
    revision = 0
    while True:
        call = registry.watch(revision)
        try:
            while True:
                async with asyncio.timeout(CATALOGUE_SILENT_SECONDS):
                    frame = await call.read()
                if not isinstance(frame, registry_pb2.WatchCatalogResponse):
                    break  # the stream's end
                for change in frame.tools:
                    board.learn(change.tenant_id, change.tool, now=loop.time())
                if frame.revision:
                    revision = frame.revision
                    board.catalogue_complete = True
        except TimeoutError:
            telemetry.logger().warning("catalogue_silent", seconds=CATALOGUE_SILENT_SECONDS)
        except grpc.aio.AioRpcError as error:
            telemetry.logger().warning("catalogue_broken", error=str(from_rpc_error(error)))
        finally:
            call.cancel()
        raise_if_cancelled()
        await asyncio.sleep(RETRY_SECONDS * random.uniform(0.5, 1.0))


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
