"""Runs the tests of the repository by category and by name, with whatever Python starts it.

    python3 tests/unified_test_runner.py --category integration --pattern "*agent*" --real-services

It goes on in the repository's .venv if there is one, and sets nothing up (`make setup` does). Tests over the running
stack take the servers that DATABASE_URL and REDIS_URL name, else those of docker-compose.test.yml, else embedded ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BASELINES = ROOT / "tests" / "data" / "baselines.json"
NO_DOCKER = "MAINSPRING_TEST_NO_DOCKER"
CATEGORIES = (
    ("unit", "pure, no I/O"),
    ("contract", "one real service over a real wire"),
    ("integration", "the whole running stack"),
    ("flow", "several real processes, killed and restarted"),
    ("simulation", "many processes over virtual time, from a seed"),
    ("fuzz", "hostile input, made from a seed"),
    ("tidy", "the rules of the house"),
    ("websocket", "the gateway's socket"),
    ("database", "rows and migrations"),
    ("security", "identity and isolation"),
    ("performance", "ratios in one run"),
    ("e2e", "as a user would"),
)
EXIT_NO_TESTS = 5  # pytest's own
EXIT_NOT_SET_UP = 2
WARN_FACTOR = 2.0
YARDSTICK_ROUNDS = 5

Report = dict[str, Any]  # Any: JSON values


def main(arguments: Sequence[str]) -> int:
    """Runs what the arguments ask for and returns the exit code: not 0 when a test failed or none was found."""
    options = parse(arguments)
    if options.list_categories:
        for name, meaning in CATEGORIES:
            print(f"{name:12} {meaning}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        report_file = Path(folder) / "report.json"
        environment = {**os.environ, **({NO_DOCKER: "1"} if options.no_docker else {})}
        done = subprocess.run(
            pytest_command(options, report_file), cwd=ROOT, env=environment, capture_output=options.list, text=True
        )
        code = done.returncode
        if options.list and code not in (0, EXIT_NO_TESTS):
            print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        if not report_file.exists():
            print("pytest ended before it could say how the tests went.", file=sys.stderr)
            return code or 1
        report: Report = json.loads(report_file.read_text(encoding="utf-8"))
    tests = report["tests"]
    if options.list:
        print("\n".join(tests))
    print_counts(tests)
    if options.json_output:
        write_json(Path(options.json_output), arguments, code, tests)
    if options.baseline:
        chosen = options.category or [name for name, _ in CATEGORIES]
        keep_baseline(options.baseline, {name: times for name, times in summarize(tests).items() if name in chosen})
    if not tests:
        print("No test was found.", file=sys.stderr)
        return code or EXIT_NO_TESTS
    return code


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    names = [name for name, _ in CATEGORIES]
    add("--category", action="append", choices=names, default=[], help="run these only; may be given again")
    add("--pattern", default="", help="run only tests whose whole node id matches, e.g. '*agent*'; in any case")
    add("--real-services", action="store_true", help="fail at once unless PostgreSQL and Redis can be had")
    add("--no-docker", action="store_true", help="neither use nor start the pair of docker-compose.test.yml")
    add("--list", action="store_true", help="list the tests instead of running them")
    add("--list-categories", action="store_true", help="list the categories and end")
    add("--workers", type=int, default=0, metavar="N", help="run in N processes, each with a stack of its own")
    add("--fast-fail", action="store_true", help="stop at the first failure")
    add("--coverage", action="store_true", help="measure which lines the tests reach, in child processes too")
    add("--json-output", default="", metavar="FILE", help="write the outcome of each test to FILE")
    add(
        "--baseline", choices=("write", "compare"), help="keep the times per category, or warn over twice the kept ones"
    )
    options = parser.parse_args(arguments)
    if options.baseline == "write" and options.pattern:
        parser.error("--baseline write needs whole categories: leave --pattern out")
    return options


def pytest_command(options: argparse.Namespace, report_file: Path) -> list[str]:
    """The pytest command that does what the options ask for."""
    command = [sys.executable, "-m", "pytest", "-p", "test_framework.runner_plugin", f"--report-file={report_file}"]
    if options.category:
        command += ["-m", " or ".join(options.category), *folders_of(options.category)]
    if options.pattern:
        command += [f"--node-pattern={options.pattern}"]
    if options.list:
        return [*command, "--collect-only", "--quiet"]
    if options.real_services:
        command += ["-p", "test_framework.fixtures.preflight"]
    if options.workers:
        command += ["--numprocesses", str(options.workers), "--dist", "loadfile"]
    if options.fast_fail:
        command += ["--exitfirst"]
    if options.coverage:
        command += ["--cov", "--cov-config=tests/data/coverage.ini", "--cov-report=term"]
    return command


def folders_of(categories: Sequence[str]) -> list[str]:
    """The folders to look in; none, and so all, when a category is not a folder of its own."""
    folders = [ROOT / "tests" / category for category in categories]
    return [str(folder.relative_to(ROOT)) for folder in folders] if all(map(Path.is_dir, folders)) else []


def print_counts(tests: Mapping[str, Report]) -> None:
    """Prints the count per file, and what became of them."""
    files: dict[str, Counter[str]] = {}
    for node_id, test in tests.items():
        files.setdefault(node_id.partition("::")[0], Counter())[test["outcome"]] += 1
    print(f"\n{'tests':>5}  file")
    for name, outcomes in files.items():
        print(f"{outcomes.total():>5}  {name}  ({_outcomes(outcomes)})")
    print(f"{len(tests):>5}  in all  ({_outcomes(sum(files.values(), Counter()))})")


def write_json(path: Path, arguments: Sequence[str], code: int, tests: Mapping[str, Report]) -> None:
    """Writes the outcome of each test, their counts and the machine's yardstick."""
    counts = Counter(test["outcome"] for test in tests.values())
    document = {
        "arguments": list(arguments),
        "exit_code": code,
        "counts": dict(counts),
        "yardstick_seconds": measure_yardstick(),
        "tests": [{"node_id": node_id, **test} for node_id, test in tests.items()],
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def keep_baseline(verb: str, times: Mapping[str, Report], path: Path = BASELINES) -> list[str]:
    """Writes the times per category, or warns (and returns the warnings) where they are over twice the kept ones.

    A slower machine is no regression: times are compared after dividing by the yardstick, a fixed piece of work.
    """
    now: Report = {"yardstick_seconds": measure_yardstick(), "categories": dict(times)}
    if verb == "write":
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = json.loads(path.read_text(encoding="utf-8"))["categories"] if path.exists() else {}
        now["categories"] = {**kept, **now["categories"]}
        path.write_text(json.dumps(now, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return []
    if not path.exists():
        print(f"There is no baseline yet: make one with --baseline write ({path.name}).", file=sys.stderr)
        return []
    warnings = compare(json.loads(path.read_text(encoding="utf-8")), now)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return warnings


def summarize(tests: Mapping[str, Report]) -> dict[str, dict[str, float]]:
    """Median and 95th percentile of the tests' seconds, per category."""
    seconds: dict[str, list[float]] = {}
    for test in tests.values():
        if test["outcome"] == "passed":
            for category in test["categories"]:
                seconds.setdefault(category, []).append(test["seconds"])
    return {
        category: {
            "tests": len(values),
            "median_seconds": round(statistics.median(values), 4),
            "p95_seconds": round(sorted(values)[min(len(values) - 1, int(len(values) * 0.95))], 4),
        }
        for category, values in seconds.items()
    }


def compare(kept: Report, now: Report) -> list[str]:
    """What takes more than twice as long as it was kept, on a machine of the same speed.

    A part of a category has a median of its own: it is compared only when at least as many tests ran as were kept.
    """
    speed = now["yardstick_seconds"] / kept["yardstick_seconds"]
    warnings = []
    for category, times in now["categories"].items():
        if times["tests"] < kept["categories"].get(category, {}).get("tests", 0):
            continue
        for name in ("median_seconds", "p95_seconds"):
            expected = kept["categories"].get(category, {}).get(name, 0.0) * speed
            if expected and times[name] > WARN_FACTOR * expected:
                warnings.append(f"{category}: {name} is {times[name]} s, expected about {expected:.4f} s here")
    return warnings


def measure_yardstick() -> float:
    """Seconds that this machine needs for a fixed piece of work: the median of a few rounds."""
    rounds = []
    for _ in range(YARDSTICK_ROUNDS):
        start = time.perf_counter()
        digest = b""
        for number in range(20_000):
            digest = hashlib.sha256(digest + number.to_bytes(4, "big")).digest()
        rounds.append(time.perf_counter() - start)
    return round(statistics.median(rounds), 5)


def go_on_in_virtual_environment() -> None:
    """Starts this program again with the repository's own Python; returns only when it runs there already."""
    folder = ROOT / ".venv"
    python = folder / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != folder.resolve():
        os.execv(python, [str(python), *sys.argv])


def _outcomes(outcomes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())) or "none"


if __name__ == "__main__":
    go_on_in_virtual_environment()
    try:
        import pytest  # noqa: F401  # only whether it is there
    except ImportError:
        sys.exit("pytest is not installed for this Python: run `make setup` first.")
    sys.exit(main(sys.argv[1:]))
