"""The guard: what a killed supervisor leaves running ends within seconds, the deaf too, and nothing else does."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import psutil
import pytest

from test_framework.waiting import wait_until
from tests.flow.supervising import lives

# Starts a process that listens to signals and one that does not, has them guarded, and says their pids.
SUPERVISOR = """
import asyncio, sys
from pathlib import Path
from mainspring.dev.child import Child
from mainspring.dev.guard import guarding
from mainspring.embedded.launch import Launch

class Owner:
    def started(self, child): pass
    def serving(self, child, *, seconds): pass
    def ended(self, child, *, returncode, restart_seconds): pass

async def heard(ready, pid):
    while not ready.exists():
        await asyncio.sleep(0.01)

async def main(folder):
    async with guarding() as guard, asyncio.TaskGroup() as tasks:
        children = []
        for name, script in (("good", ""), ("deaf", "trap '' TERM;")):
            ready = folder / name
            argv = ("/bin/sh", "-c", f"{script} touch {ready}; while :; do sleep 0.1; done")
            is_ready = lambda pid, ready=ready: heard(ready, pid)
            what = Launch(name=name, argv=argv, log=folder / f"{name}.log", ready=is_ready)
            children.append(Child(what, parent_fd=-1, owner=Owner()))
        supervisors = [tasks.create_task(child.supervise()) for child in children]
        for child in children:
            await child.serving.wait()
        guard.watch(children)
        print(*(child.pid for child in children), flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        if len(sys.argv) > 2:
            guard.watch(children[:1])
            print("watching one", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
        for supervisor in supervisors:
            supervisor.cancel()

asyncio.run(main(Path(sys.argv[1])))
"""


async def supervisor_of(folder: Path, *options: str) -> tuple[asyncio.subprocess.Process, list[int], int]:
    """A supervisor with its two processes, and the pid of its guard."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        SUPERVISOR,
        str(folder),
        *options,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    pids = [int(word) for word in (await asyncio.wait_for(process.stdout.readline(), 20)).split()]
    [guard] = [child.pid for child in psutil.Process(process.pid).children() if child.pid not in pids]
    return process, pids, guard


async def test_what_a_killed_supervisor_leaves_ends_within_five_seconds(tmp_path: Path) -> None:
    supervisor, pids, guard = await supervisor_of(tmp_path)
    supervisor.kill()
    await supervisor.wait()
    killed = time.monotonic()
    await wait_until(lambda: not lives(pids[0]), 3, what="an end of the one that listens")
    assert lives(pids[1])
    await wait_until(lambda: not lives(pids[1]), 10, what="an end of the deaf one")
    assert time.monotonic() - killed > 3.5
    await wait_until(lambda: not lives(guard), 2, what="an end of the guard")


@pytest.mark.parametrize("leaves", ["by itself", "killed"])
async def test_only_what_is_still_guarded_is_ended(tmp_path: Path, leaves: str) -> None:
    supervisor, pids, guard = await supervisor_of(tmp_path, "unwatch")
    assert supervisor.stdin is not None
    assert supervisor.stdout is not None
    try:
        supervisor.stdin.write(b"\n")
        await asyncio.wait_for(supervisor.stdout.readline(), 10)
        if leaves == "killed":
            supervisor.kill()
        else:
            supervisor.stdin.write(b"\n")
        await asyncio.wait_for(supervisor.wait(), 10)
        await wait_until(lambda: not lives(guard), 10, what="an end of the guard")
        assert [lives(pid) for pid in pids] == ([False, True] if leaves == "killed" else [True, True])
    finally:
        for pid in filter(lives, pids):
            psutil.Process(pid).kill()
