"""The tools that workloads call, served by the stack's own worker: a payload of some size, a pair of clock reads."""

from __future__ import annotations

import base64
import random
import time
from typing import Annotated, Final

from mainspring import tool
from pydantic import Field

PAYLOAD_BYTES_MAX: Final = 1 << 20

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
