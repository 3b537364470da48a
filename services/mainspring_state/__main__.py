"""Starts the state service: `python -m mainspring_state [serve]`, or brings its schema up to date: `… migrate`."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path

from mainspring.v1 import state_pb2, state_pb2_grpc
from mainspring_kit import postgres, server
from mainspring_kit.tasks import background

from mainspring_state.config import MigrateSettings, StateSettings
from mainspring_state.engine.root import Engine
from mainspring_state.servicer import StateServicer
from mainspring_state.store.wire import Wire

PACKAGE = resources.files("mainspring_state")


@asynccontextmanager
async def wired(settings: StateSettings) -> AsyncIterator[tuple[StateServicer, Engine]]:
    """The servicer with its engine, working while the block runs."""
    async with await postgres.connect(settings.database_url, size_max=settings.database_connections_max) as pool:
        wire = Wire(settings.redis_url)
        try:
            engine = Engine(settings, pool, wire=wire)
            async with background(engine.run()):
                yield StateServicer(engine), engine  # type: ignore[abstract]  # later rpcs are missing
        finally:
            await wire.close()


async def serve(settings: StateSettings, stop: asyncio.Event) -> None:
    """Serves until `stop` is set."""
    async with (
        wired(settings) as (servicer, engine),
        server.serving(settings, [_service(servicer)], ready=lambda: engine.is_ready),
    ):
        await stop.wait()
        engine.drain()


def _service(servicer: StateServicer) -> server.Service:
    descriptor = state_pb2.DESCRIPTOR.services_by_name["StateService"]
    return server.Service(descriptor, state_pb2_grpc.add_StateServiceServicer_to_server, servicer)


async def migrate(settings: MigrateSettings, stop: asyncio.Event) -> None:
    """Brings the schema `state` to its newest version."""
    with resources.as_file(PACKAGE.joinpath("sql/migrations")) as directory:
        await postgres.migrate(
            settings.owner_database_url, Path(directory), schema="state", role_url=settings.database_url
        )


def main() -> int:
    """Runs the command and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mainspring_state", description=__doc__)
    parser.add_argument("command", nargs="?", default="serve", choices=["serve", "migrate"])
    if parser.parse_args().command == "migrate":
        return server.run("state", MigrateSettings, main=migrate)
    return server.run("state", StateSettings, main=serve)


if __name__ == "__main__":
    sys.exit(main())
