"""Starts the registry: `python -m mainspring_registry [serve]`, or brings its schema up to date: `… migrate`."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path

from mainspring.v1 import registry_pb2, registry_pb2_grpc
from mainspring_kit import postgres, server
from mainspring_kit.channel import Peer
from mainspring_kit.identity import ServiceTokens
from mainspring_kit.tasks import background

from mainspring_registry.config import MigrateSettings, RegistrySettings
from mainspring_registry.core.spec import agent_schema
from mainspring_registry.engine import CatalogWatch, Clockwork
from mainspring_registry.peers import Execution
from mainspring_registry.servicer import RegistryServicer, Schemas
from mainspring_registry.store.catalog import Store
from mainspring_registry.store.schedules import Schedules

PACKAGE = resources.files("mainspring_registry")


@asynccontextmanager
async def wired(settings: RegistrySettings) -> AsyncIterator[tuple[RegistryServicer, CatalogWatch]]:
    """The servicer with its store and its watch of the catalog, working while the block runs."""
    schemas = Schemas(
        agent=agent_schema(PACKAGE.joinpath("agent.schema.json").read_bytes()),
        schedule=agent_schema(PACKAGE.joinpath("schedule.schema.json").read_bytes()),
    )
    tokens = ServiceTokens(settings.service_secret.get_secret_value(), "registry")
    async with (
        await postgres.connect(settings.database_url, size_max=settings.database_connections_max) as pool,
        Peer(settings.execution_target, tokens) as execution_peer,
    ):
        store, schedules = Store(pool), Schedules(pool)
        watch = CatalogWatch(store, settings.database_url, watchers_max=settings.watchers_max)
        clockwork = Clockwork(schedules, Execution(execution_peer))
        async with background(watch.run(), clockwork.run()):
            servicer = RegistryServicer(store, schedules, watch=watch, schemas=schemas)  # type: ignore[abstract]  # later rpcs
            yield servicer, watch


async def serve(settings: RegistrySettings, stop: asyncio.Event) -> None:
    """Serves until `stop` is set."""
    async with (
        wired(settings) as (servicer, watch),
        server.serving(settings, [_service(servicer)], ready=watch.is_connected),
    ):
        await stop.wait()
        watch.drain()


def _service(servicer: RegistryServicer) -> server.Service:
    descriptor = registry_pb2.DESCRIPTOR.services_by_name["RegistryService"]
    return server.Service(descriptor, registry_pb2_grpc.add_RegistryServiceServicer_to_server, servicer)


async def migrate(settings: MigrateSettings, stop: asyncio.Event) -> None:
    """Brings the schema `registry` to its newest version."""
    with resources.as_file(PACKAGE.joinpath("sql/migrations")) as directory:
        await postgres.migrate(
            settings.owner_database_url, Path(directory), schema="registry", role_url=settings.database_url
        )


def main() -> int:
    """Runs the command and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mainspring_registry", description=__doc__)
    parser.add_argument("command", nargs="?", default="serve", choices=["serve", "migrate"])
    if parser.parse_args().command == "migrate":
        return server.run("registry", MigrateSettings, main=migrate)
    return server.run("registry", RegistrySettings, main=serve)


if __name__ == "__main__":
    sys.exit(main())
