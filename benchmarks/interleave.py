"""The platform beside its peers in one run: slices of ours and of each peer in turn, medians of the ratios of pairs."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import asyncpg
from mainspring.dev import Stack

from benchmarks.harness import COUNTED_MIN, Cpu, Report, Slice, Subject, keep, progress, under_test
from benchmarks.peers.child import PeerLoad, child
from benchmarks.peers.environment import PROGRAMS, SLOW_PROGRAMS, Program, UnavailableError

CALLERS: Final = (1, 64)
SECONDS_MAX: Final = 2.0
SLOW_ROUNDS: Final = 3
WARM_UP_CALLERS: Final = 8
WARM_UP_SECONDS: Final = 1.0
IDLE_SECONDS: Final = 3.0
# The platform's own is 0.
REDIS_DATABASE: Final = 1
# Figure of the ratio -> whether more is better: above 1, a ratio always says that ours is better.
COMPARED: Final = {"runs_per_second": True, "p50_ms": False, "cpu_ms_per_run": False}

Pair = tuple[Slice, Slice]


@dataclass(frozen=True, slots=True)
class Rounds:
    """How many rounds of slices of so many seconds; on an uneven machine more than the least, until enough count."""

    least: int
    most: int
    seconds: float


async def measure_beside_peers(running: Stack, ours: Subject, report: Report, *, seconds: float, repeat: int) -> None:
    """Adds `peers` and `ratios` for every peer that is set up; of the others a note with the reason."""
    seconds = min(seconds, SECONDS_MAX)
    many = Rounds(repeat, 2 * repeat, seconds)
    few = Rounds(min(repeat, SLOW_ROUNDS), min(repeat, SLOW_ROUNDS), seconds)
    await _measure_group(PROGRAMS, running, ours, report=report, rounds=many)
    for program in SLOW_PROGRAMS:
        await _measure_group([program], running, ours, report=report, rounds=few)


async def _measure_group(
    programs: Sequence[Program], running: Stack, ours: Subject, *, report: Report, rounds: Rounds
) -> None:
    with tempfile.TemporaryDirectory(prefix="mainspring-peers-") as folder:
        async with _peers(programs, running, Path(folder), report=report) as peers:
            for peer in list(peers):
                try:
                    await peer.measure(WARM_UP_CALLERS, WARM_UP_SECONDS)
                except UnavailableError as error:
                    _leave_out(peer.name, error, report)
                    peers.remove(peer)
            await _measure_idle(running, peers, report)
            for callers in CALLERS:
                await _rounds(ours, peers, callers, rounds=rounds, report=report)


async def _rounds(ours: Subject, peers: list[PeerLoad], callers: int, *, rounds: Rounds, report: Report) -> None:
    """Ours, a peer, ours, the next peer, and so on; on an uneven machine again for those of which too few count."""
    pairs: dict[str, list[Pair]] = {peer.name: [] for peer in peers}
    for number in range(rounds.most):
        for peer in list(peers):
            if number >= rounds.least and counted(pairs[peer.name]) >= min(COUNTED_MIN, rounds.least):
                continue
            progress(f"{callers} callers, round {number + 1} of {rounds.least}: mainspring and {peer.name}")
            mine = await ours.measure(callers, rounds.seconds)
            try:
                pairs[peer.name].append((mine, await peer.measure(callers, rounds.seconds)))
            except UnavailableError as error:
                _leave_out(peer.name, error, report)
                peers.remove(peer)
    for name, found in pairs.items():
        if found:
            add_pairs(name, callers, found, report=report)


def counted(pairs: Sequence[Pair]) -> int:
    """How many of these pairs count: those in which both slices do."""
    flags = keep([piece for pair in pairs for piece in pair])
    return sum(one and two for one, two in zip(flags[::2], flags[1::2], strict=True))


def add_pairs(peer: str, callers: int, pairs: Sequence[Pair], *, report: Report) -> None:
    """Adds a peer's figures, ours beside it, and the ratios of those pairs in which a run of the peer's ended."""
    ours, theirs = [mine for mine, _ in pairs], [other for _, other in pairs]
    report.add_peer(peer, str(callers), theirs)
    report.add(f"{callers}_beside_{peer}", [_compared(mine) for mine in ours])
    whole = [(mine, other) for mine, other in pairs if other.figures["runs_per_second"] > 0]
    if len(whole) < len(pairs):
        report.notes.append(
            f"{peer}, {callers} callers: no run ended in {len(pairs) - len(whole)} of {len(pairs)} slices"
        )
    if not whole:
        return
    ours, theirs = [mine for mine, _ in whole], [other for _, other in whole]
    for figure, more_is_better in COMPARED.items():
        above, below = (ours, theirs) if more_is_better else (theirs, ours)
        report.compare(f"{peer}_{figure}_{callers}", above, below, figure)


def _compared(piece: Slice) -> Slice:
    return Slice({name: piece.figures[name] for name in COMPARED}, piece.speed)


async def _measure_idle(running: Stack, peers: Sequence[PeerLoad], report: Report) -> None:
    """What everybody uses of a core while nobody asks anything, since all wait while one is measured."""
    progress("idle")
    meters = {peer.name: peer.idle_cpu() for peer in peers}
    own = Cpu(running.pids)
    await asyncio.sleep(IDLE_SECONDS)
    report.figures["idle_cpu_percent"] = round(under_test(own.used()) / IDLE_SECONDS * 100, 2)
    for name, meter in meters.items():
        share = round(under_test(meter.used()) / IDLE_SECONDS * 100, 2)
        report.peers.setdefault(name, {})["idle_cpu_percent"] = share


@asynccontextmanager
async def _peers(
    programs: Sequence[Program], running: Stack, folder: Path, *, report: Report
) -> AsyncIterator[list[PeerLoad]]:
    """All peers that can be started, prepared."""
    async with AsyncExitStack() as held:
        found: list[PeerLoad] = []
        for program in programs:
            progress(f"starting {program.name}")
            try:
                program.require()
                found += await held.enter_async_context(_columns(program, running, folder, report=report))
            except UnavailableError as error:
                for column in program.columns:
                    _leave_out(column, error, report)
        yield found


@asynccontextmanager
async def _columns(program: Program, running: Stack, folder: Path, *, report: Report) -> AsyncIterator[list[PeerLoad]]:
    own = folder / program.name
    own.mkdir()
    database = f"peer_{program.name}"
    others = {name: running.pids.get(name, []) for name in program.uses}
    async with child(
        program.python, f"benchmarks.peers.{program.name}.program", log=folder / f"{program.name}.log"
    ) as peer:
        await _make_database(running.database_url, database)
        url = urlsplit(running.database_url)._replace(path=f"/{database}").geturl()
        redis_url = urlsplit(running.redis_url)._replace(query=f"db={REDIS_DATABASE}").geturl()
        await peer.prepare(database_url=url, redis_url=redis_url, folder=own, callers=max(CALLERS))
        report.versions |= {f"{program.name}: {package}": number for package, number in peer.versions.items()}
        yield [
            PeerLoad(name, variant, peer=peer, others=others, report=report)
            for name, variant in program.columns.items()
        ]


async def _make_database(owner_url: str, name: str) -> None:
    connection = await asyncpg.connect(owner_url)
    try:
        await connection.execute(f'CREATE DATABASE "{name}"')
    finally:
        await connection.close()


def _leave_out(name: str, error: UnavailableError, report: Report) -> None:
    report.peers.setdefault(name, {})
    report.notes.append(f"{name} is left out: {error}")
    progress(report.notes[-1])
