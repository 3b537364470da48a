"""The dispatcher's process: wires its rooms and serves until told to stop."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mainspring.v1 import dispatcher_pb2 as pb
from mainspring.v1 import dispatcher_pb2_grpc as rpc
from mainspring_kit.channel import Peer
from mainspring_kit.identity import ServiceTokens
from mainspring_kit.server import Service, run, serving
from mainspring_kit.tasks import background

from mainspring_dispatcher.config import DispatcherSettings
from mainspring_dispatcher.core.board import Board
from mainspring_dispatcher.engine import follow_catalogue, keep_time
from mainspring_dispatcher.peers import Registry
from mainspring_dispatcher.servicer import DispatcherServicer

NAME = "dispatcher"


@asynccontextmanager
async def wired(settings: DispatcherSettings) -> AsyncIterator[tuple[DispatcherServicer, Board]]:
    """The servicer over its board, with everything that runs beside it."""
    board = Board(
        # Above those of any process before, for each starts a random way up; dispatches count on from there.
        first_dispatch_id=secrets.randbits(62),
        waiting_max=settings.waiting_calls_max,
        workers_max=settings.workers_max,
    )
    tokens = ServiceTokens(settings.service_secret.get_secret_value(), NAME)
    async with Peer(settings.registry_target, tokens) as peer:
        registry = Registry(peer)
        async with background(keep_time(board), follow_catalogue(board, registry)):
            yield DispatcherServicer(board, registry), board  # type: ignore[abstract]  # the rest is not built


async def serve(settings: DispatcherSettings, stop: asyncio.Event) -> None:
    """Serves until `stop`, then drains."""
    async with wired(settings) as (servicer, board):
        service = Service(
            pb.DESCRIPTOR.services_by_name["DispatcherService"],
            rpc.add_DispatcherServiceServicer_to_server,
            servicer,
        )
        async with serving(settings, [service], ready=lambda: board.catalogue_complete):
            await stop.wait()
            await servicer.drain(settings.drain_seconds)


def main() -> int:
    """`python -m mainspring_dispatcher [serve]`; settings come from the environment."""
    parser = argparse.ArgumentParser(prog="mainspring_dispatcher", description=__doc__)
    parser.add_argument("command", nargs="?", default="serve", choices=["serve"])
    parser.parse_args()
    return run(NAME, DispatcherSettings, main=serve)


if __name__ == "__main__":
    sys.exit(main())
