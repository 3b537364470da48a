"""The tools that workloads call, served by the stack's own worker: a payload of some size, clock reads, a counter."""

from __future__ import annotations

import asyncio
import base64
import os
import random
import struct
import time
from pathlib import Path
from typing import Annotated, Final

from mainspring import tool
from pydantic import Field

PAYLOAD_BYTES_MAX: Final = 1 << 20
# How far `count` has counted, and when it last did, in seconds of this machine's clock.
COUNT: Final = struct.Struct("<qd")
COUNT_SECONDS: Final = 0.005

_FRAME_BYTES: Final = len('{"text":""}')
# Text that no compression makes much smaller, and a seed, so that two runs of a workload move the same bytes.
_RANDOM: Final = random.Random(1)
_NOISE: Final = base64.urlsafe_b64encode(_RANDOM.randbytes(PAYLOAD_BYTES_MAX * 2)).decode()


@tool(name="benchmark.payload", effect="pure")
async def payload(size: Annotated[int, Field(ge=_FRAME_BYTES, le=PAYLOAD_BYTES_MAX)]) -> dict[str, str]:
    """Gives a result whose JSON has exactly this many bytes, other ones at each call.

    Args:
        size: How many bytes.
    """
    length = size - _FRAME_BYTES
    first = _RANDOM.randrange(len(_NOISE) - length)
    return {"text": _NOISE[first : first + length]}


@tool(name="benchmark.clock", effect="pure")
async def clock() -> dict[str, float]:
    """Tells when it began and when it ended, in seconds of this machine's clock."""
    begin = time.time()
    return {"begin": begin, "end": time.time()}


@tool(name="benchmark.count", effect="pure", timeout=60)
async def count(file: str) -> dict[str, int]:
    """Counts in a file, over and over in the same place, until it is cancelled.

    Args:
        file: The file's path on the worker's machine.
    """
    handle = os.open(Path(file), os.O_WRONLY | os.O_CREAT, 0o600)
    counted = 0
    try:
        while True:
            counted += 1
            os.pwrite(handle, COUNT.pack(counted, time.time()), 0)
            await asyncio.sleep(COUNT_SECONDS)
    finally:
        os.close(handle)
