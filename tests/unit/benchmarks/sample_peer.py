"""A peer that does nothing, for the line protocol's tests: a right answer, a wrong one, a failure, a death."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from benchmarks.peers import line


async def answer() -> object:
    await asyncio.sleep(0)
    return line.QUESTION


async def answer_wrongly() -> object:
    await asyncio.sleep(0)
    return "forty-three"


async def fail() -> object:
    await asyncio.sleep(0)
    raise ValueError("no such thing")


async def die() -> object:
    os._exit(1)


@asynccontextmanager
async def prepare(order: line.Order) -> AsyncIterator[line.Prepared]:
    os.write(1, b"what a library prints is no part of the protocol\n")
    variants = {"right": answer, "wrong": answer_wrongly, "failing": fail, "dying": die}
    yield line.Prepared(variants, {order.folder: [os.getpid()]})


if __name__ == "__main__":
    line.serve(prepare, ["protobuf"], runner=asyncio.Runner())
