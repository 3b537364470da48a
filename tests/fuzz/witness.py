"""What the processes are like before and after an attack: who lives, what they hold, what they log, and whose rows."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from test_framework.agents import echo_agent
from test_framework.identities import make_context
from test_framework.stack import PROCESSES, Stack
from test_framework.user import User
from test_framework.waiting import wait_until
from test_framework.websocket_client import check_log

RSS_GROWTH_BYTES_MAX = 64 << 20
# The pools of connections to PostgreSQL grow when several are wanted at a time.
OPEN_FILES_GROWTH_MAX = 8
SETTLE_SECONDS = 30.0
LEVELS = ("error", "critical")


@dataclass(frozen=True, slots=True)
class Bystander:
    """A user of a tenant that no attacker may see or touch, and a run that was there before."""

    tenant_id: str
    user_id: str
    run_id: str


@dataclass(frozen=True, slots=True)
class Footprint:
    """The processes at one moment."""

    pids: Mapping[str, list[int]]
    rss_bytes: Mapping[str, int]
    open_files: Mapping[str, int]


class Witness:
    """Watches a stack through an attack, then says whether it is as it was."""

    def __init__(self, stack: Stack, bystander: Bystander) -> None:
        self._stack = stack
        self.bystander = bystander
        self._before = self._footprint()
        self._log_ends = {name: len(stack.log_text(name)) for name in PROCESSES}
        self._rows = ""

    @classmethod
    async def begin(cls, stack: Stack) -> Witness:
        """Makes the bystander's run and remembers how everything is."""
        context = make_context(tenant_id="bystander")
        async with User(stack, context) as user:
            await user.register(echo_agent())
            async with user.stream() as socket:
                events = await socket.run("echo", {"value": "mine"})
        witness = cls(stack, Bystander(context.tenant_id, context.user_id, events[0]["run_id"]))
        witness._rows = await witness._bystanders_rows()
        return witness

    async def check(self, streams: Counter[str]) -> str:
        """Fails unless everything is as before but for the attackers' own rows; `streams`: what they opened, by method.

        Returns what has grown.
        """
        await self._serves_on()
        after = await wait_until(self._settled, SETTLE_SECONDS, what="open files as before the attack")
        assert after is not None
        assert after.pids == self._before.pids, after.pids
        faults = self._faults()
        assert not faults, faults
        growth = {name: size - self._before.rss_bytes[name] for name, size in after.rss_bytes.items()}
        assert max(growth.values()) < RSS_GROWTH_BYTES_MAX, growth
        await wait_until(lambda: not self._open_streams(streams), what="the end of all streams")
        assert await self._bystanders_rows() == self._rows
        return ", ".join(f"{name} {size / (1 << 20):+.1f} MiB" for name, size in growth.items())

    async def _serves_on(self) -> None:
        async with User(self._stack, make_context()) as user:
            await user.register(echo_agent())
            async with user.stream() as socket:
                check_log(await socket.run("echo", {"value": "still there"}))

    def _settled(self) -> Footprint | None:
        after = self._footprint()
        growth = [after.open_files[name] - count for name, count in self._before.open_files.items()]
        return after if max(growth) <= OPEN_FILES_GROWTH_MAX else None

    def _footprint(self) -> Footprint:
        pids = {name: list(self._stack.pids[name]) for name in PROCESSES}
        processes = {name: psutil.Process(each[0]) for name, each in pids.items()}
        return Footprint(
            pids,
            {name: process.memory_info().rss for name, process in processes.items()},
            {name: process.num_fds() for name, process in processes.items()},
        )

    def _faults(self) -> list[str]:
        """What the processes have logged since as an error, and whatever is no log line."""
        found = []
        for name in PROCESSES:
            for line in self._lines(name):
                fields = json.loads(line) if line.startswith("{") else {"level": LEVELS[0]}
                if fields["level"] in LEVELS or "Traceback" in line:
                    found.append(f"{name}: {line}")
        return found

    def _open_streams(self, streams: Counter[str]) -> Counter[str]:
        closed: Counter[str] = Counter()
        for name in PROCESSES:
            for line in self._lines(name):
                if method := re.search(r'"method":"([^"]+)".*"event":"stream_closed"', line):
                    closed[method[1]] += 1
        return streams - closed

    def _lines(self, name: str) -> list[str]:
        return [line for line in self._stack.log_text(name)[self._log_ends[name] :].splitlines() if line.strip()]

    async def _bystanders_rows(self) -> str:
        """A digest of every row of the bystander's tenant, in every table that has tenants."""
        tables = await self._stack.rows.as_owner(
            "SELECT table_schema AS schema, table_name AS name FROM information_schema.columns "
            "WHERE column_name = 'tenant_id' AND table_schema IN ('state', 'registry') ORDER BY 1, 2"
        )
        digest = hashlib.sha256()
        for table in tables:
            rows = await self._stack.rows.as_owner(
                f"SELECT t::text AS row FROM {table['schema']}.{table['name']} t WHERE tenant_id = $1 ORDER BY 1",
                self.bystander.tenant_id,
            )
            digest.update(repr((table, rows)).encode())
        return digest.hexdigest()
