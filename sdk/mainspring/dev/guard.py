"""A tiny process that outlives its stack for a moment: when the supervisor is gone, it ends what is left running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Final

from mainspring.dev.child import Child

# Reads what to guard, one line each time that changes, until the end of the pipe, whose other end only the supervisor
# holds: so it learns of any death, also by SIGKILL. Then everybody gets 4 s before the hard signal.
_SCRIPT: Final = """
guarded=
while read -r line; do guarded=$line; done
for each in $guarded; do rest=${each#*:}; kill -"${rest%%:*}" "${each%%:*}"; done 2>/dev/null
tries=0
while [ $tries -lt 40 ]; do
  alive=
  for each in $guarded; do kill -0 "${each%%:*}" && alive=yes; done 2>/dev/null
  [ "$alive" ] || exit 0
  tries=$((tries + 1))
  sleep 0.1
done
for each in $guarded; do kill -"${each##*:}" "${each%%:*}"; done 2>/dev/null
"""


class Guard:
    """Knows which processes live. Processes that watch their parent themselves hear it from both."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    def watch(self, children: Iterable[Child]) -> None:
        """Guards these from now on, and no others."""
        words = [
            f"{child.pid}:{_name(child.launch.stop_signal)}:{_name(child.launch.hard_stop_signal)}"
            for child in children
            if child.pid is not None
        ]
        self._writer.write((" ".join(words) + "\n").encode())


@asynccontextmanager
async def guarding() -> AsyncIterator[Guard]:
    """A guard for as long as the block runs. Leaving the block ends the guard and nothing else."""
    process = await asyncio.create_subprocess_exec(
        "/bin/sh",
        "-c",
        _SCRIPT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        yield Guard(process.stdin)
    finally:
        if process.returncode is None:
            process.kill()
        process.stdin.close()
        await process.wait()


def _name(number: int) -> str:
    return str(int(number))
