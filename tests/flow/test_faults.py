"""The fault drill, short: everything is troubled once under a light load, and nothing is lost, doubled or missing."""

from __future__ import annotations

import asyncio
import json
import sys

import pytest

from test_framework.stack import ROOT

pytestmark = [pytest.mark.flow, pytest.mark.real_services, pytest.mark.long]

SECONDS = 30
# Runs a second: light, for what is tried here is not speed.
RATE = 60
# Ten times what issue 4 asks of a measured run.
TAKEOVER_SECONDS_MAX = 50.0


@pytest.mark.timeout(400)
async def test_nothing_is_lost_doubled_or_missing_under_faults() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.faults", "--target", "all", "--json"),
        *("--seconds", str(SECONDS), "--rate", str(RATE)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(350):
            output, log = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, log.decode()[-8_000:]
    figures = json.loads(output)["figures"]
    breaches = {name: figures[name] for name in ("lost", "doubled", "gaps", "foreign", "mismatched")}
    assert set(breaches.values()) == {0}, breaches
    assert figures["started"] == figures["ended"] > SECONDS * RATE / 2
    assert figures["faults"] >= 2, "the machine is too busy for a drill"
    assert figures["takeover_p99_s"] < TAKEOVER_SECONDS_MAX
