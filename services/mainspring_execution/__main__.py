"""The execution service's process: wires its rooms and serves until told to stop."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from mainspring.v1 import execution_pb2 as pb
from mainspring.v1 import execution_pb2_grpc as rpc
from mainspring_kit.channel import Peer
from mainspring_kit.identity import ServiceTokens, new_id
from mainspring_kit.server import Service, run, serving
from mainspring_kit.tasks import background

from mainspring_execution.config import ExecutionSettings
from mainspring_execution.engine.catalog import Catalog
from mainspring_execution.engine.claims import Claims
from mainspring_execution.engine.deltas import Deltas
from mainspring_execution.engine.lease import Lease
from mainspring_execution.engine.runs import Runs
from mainspring_execution.engine.surroundings import Surroundings
from mainspring_execution.models.clients import Clients
from mainspring_execution.models.conversing import Shop
from mainspring_execution.models.credentials import Credentials
from mainspring_execution.models.prices import load_prices
from mainspring_execution.peers import Dispatcher, Registry, State
from mainspring_execution.servicer import ExecutionServicer

NAME = "execution"


@dataclass(frozen=True, slots=True)
class Execution:
    """The wired service."""

    servicer: ExecutionServicer
    runs: Runs
    claims: Claims
    around: Surroundings

    def is_ready(self) -> bool:
        """Whether runs can be started here."""
        return self.around.lease.is_held and not self.runs.is_draining

    async def drain(self, seconds: float) -> None:
        """Takes no more, lets steps end, and hands the runs to other executors at once."""
        self.runs.is_draining = True
        self.claims.stop()
        self.servicer.end_streams()
        await self.runs.drain(seconds)
        await self.around.lease.leave()


@asynccontextmanager
async def wired(settings: ExecutionSettings) -> AsyncIterator[Execution]:
    """The servicer with everything that runs beside it."""
    tokens = ServiceTokens(settings.service_secret.get_secret_value(), NAME)
    # Another process under the same instance id is another executor: this one's runs are not its own.
    executor_id = f"{settings.instance_id}-{new_id()[-8:]}"
    async with (
        Peer(settings.registry_target, tokens) as registry_peer,
        Peer(settings.dispatcher_target, tokens) as dispatcher_peer,
        Peer(settings.state_target, tokens) as state_peer,
        aclosing(_open_shop(settings)) as shop,
    ):
        state, dispatcher = State(state_peer), Dispatcher(dispatcher_peer)
        catalog = Catalog(Registry(registry_peer), shop)
        lease = Lease(state, executor_id)
        around = Surroundings(state, dispatcher, catalog, lease, Deltas(state))
        runs = Runs(around, runs_max=settings.runs_max)
        claims = Claims(around, runs)
        async with background(
            state.appends.run(),
            around.deltas.run(),
            dispatcher.calls.run(),
            catalog.watch(),
            lease.beat(runs.take_input),
            claims.run(),
        ) as tasks:
            runs.open(tasks)
            yield Execution(ExecutionServicer(runs, state), runs, claims, around)


def _open_shop(settings: ExecutionSettings) -> Shop:
    return Shop(
        Clients(),
        Credentials(Path(settings.credentials_dir) if settings.credentials_dir else None, os.environ),
        load_prices(Path(settings.prices_file) if settings.prices_file else None),
        settings.model_addresses(),
    )


async def serve(settings: ExecutionSettings, stop: asyncio.Event) -> None:
    """Serves until `stop`, then drains."""
    async with wired(settings) as execution:
        service = Service(
            pb.DESCRIPTOR.services_by_name["ExecutionService"],
            rpc.add_ExecutionServiceServicer_to_server,
            execution.servicer,
        )
        async with serving(settings, [service], ready=execution.is_ready):
            await stop.wait()
            await execution.drain(settings.drain_seconds)


def main() -> int:
    """`python -m mainspring_execution [serve]`; settings come from the environment."""
    parser = argparse.ArgumentParser(prog="mainspring_execution", description=__doc__)
    parser.add_argument("command", nargs="?", default="serve", choices=["serve"])
    parser.parse_args()
    return run(NAME, ExecutionSettings, main=serve)


if __name__ == "__main__":
    sys.exit(main())
