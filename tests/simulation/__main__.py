"""`python -m tests.simulation SEED` plays one history and shows its trace; `--histories N` plays many from SEED on.

`--mutation NAME` plays them over a product that is broken in this way: to see which faults histories find.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator
from functools import partial

from tests.simulation.history import Outcome, play
from tests.simulation.mutations import MUTATIONS, mutated

# A process plays so many and ends: that is quicker than to collect their garbage.
CHUNK = 200
CHUNK_FIRST = 50
SHOWN_MAX = 20


def play_chunk(seeds: range, *, mutation: str = "") -> list[Outcome]:
    """Plays the histories of these seeds in a process of its own; gives those in which an invariant broke."""
    gc.disable()
    # Tasks that were made for a process that is dead never begin.
    warnings.simplefilter("ignore", RuntimeWarning)
    with mutated(mutation):
        return [outcome for outcome in map(play, seeds) if outcome.violations]


def play_many(seeds: range, *, processes: int, chunk: int, mutation: str = "") -> Iterator[list[Outcome]]:
    """The failed histories, chunk by chunk."""
    chunks = [seeds[start : start + chunk] for start in range(0, len(seeds), chunk)]
    with multiprocessing.get_context("fork").Pool(processes, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(partial(play_chunk, mutation=mutation), chunks, chunksize=1)


def main() -> int:
    """Exit code 1: an invariant broke."""
    parser = argparse.ArgumentParser(prog="tests.simulation", description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--histories", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--mutation", choices=sorted(MUTATIONS), default="")
    parser.add_argument("--first", action="store_true", help="end with the first chunk in which an invariant breaks")
    asked = parser.parse_args()
    if not asked.histories:
        # As among many: what is collected when takes steps of the history.
        gc.disable()
        with mutated(asked.mutation):
            outcome = play(asked.seed, trace=lambda line: print(line))
        print(*outcome.violations or ["all invariants hold"], sep="\n")
        return bool(outcome.violations)
    option = f' --mutation "{asked.mutation}"' if asked.mutation else ""
    began = time.perf_counter()
    failed: list[Outcome] = []
    played = 0
    seeds = range(asked.seed, asked.seed + asked.histories)
    chunk = CHUNK_FIRST if asked.first else CHUNK
    for outcomes in play_many(seeds, processes=asked.processes, chunk=chunk, mutation=asked.mutation):
        for outcome in outcomes[: max(0, SHOWN_MAX - len(failed))]:
            print(f"seed {outcome.seed}: {outcome.violations[0]}")
            print(f"  to see it: python -m tests.simulation {outcome.seed}{option}", flush=True)
        failed += outcomes
        played += min(chunk, asked.histories - played)
        if failed and asked.first:
            break
    print(f"{played} histories, {len(failed)} failed, {time.perf_counter() - began:.1f} s")
    return bool(failed)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets are walked in the same order in every replay.
        os.execve(
            sys.executable,
            [sys.executable, "-m", "tests.simulation", *sys.argv[1:]],
            os.environ | {"PYTHONHASHSEED": "0"},
        )
    sys.exit(main())
