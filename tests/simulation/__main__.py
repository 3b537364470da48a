"""`python -m tests.simulation SEED` plays one history and shows its trace; `--histories N` plays many from SEED on."""

from __future__ import annotations

import argparse
import gc
import sys
import time

from tests.simulation.history import Outcome, play

GARBAGE_HISTORIES = 100


def play_many(seeds: range, *, failures_max: int = 20) -> tuple[int, list[Outcome]]:
    """Plays the histories of these seeds; how many were played, and those in which an invariant broke."""
    failed: list[Outcome] = []
    played = 0
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for seed in seeds:
            outcome = play(seed)
            played += 1
            if outcome.violations:
                failed.append(outcome)
                if len(failed) >= failures_max:
                    break
            if played % GARBAGE_HISTORIES == 0:
                gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    return played, failed


def describe(outcome: Outcome) -> str:
    """What broke, and how to see it again."""
    return f"seed {outcome.seed}: {outcome.violations[0]} (python -m tests.simulation {outcome.seed})"


def main() -> int:
    """Exit code 1: an invariant broke."""
    parser = argparse.ArgumentParser(prog="tests.simulation", description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--histories", type=int, default=0)
    arguments = parser.parse_args()
    if not arguments.histories:
        outcome = play(arguments.seed, trace=lambda line: sys.stdout.write(line + "\n"))
        sys.stdout.write(f"{outcome}\n")
        return bool(outcome.violations)
    began = time.process_time()
    played, failed = play_many(range(arguments.seed, arguments.seed + arguments.histories))
    for outcome in failed:
        sys.stdout.write(describe(outcome) + "\n")
    sys.stdout.write(f"{played} histories, {len(failed)} failed, {time.process_time() - began:.1f} s of CPU\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
