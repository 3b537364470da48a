"""Writes the figures of drills into docs/faults.md: `python -m benchmarks.faults.page FILE…`, given their JSON."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "faults.md"
_COLUMNS: Final = (
    *("seconds", "rate", "load_average", "faults", "started", "ended", "lost", "doubled", "gaps", "foreign"),
    *("mismatched", "values_refused", "recovered", "stalled", "takeover_p50_s", "takeover_p99_s", "takeover_max_s"),
)


def main() -> int:
    """Rewrites what stands between the page's two markers."""
    # Any: JSON.
    drills: list[dict[str, Any]] = [json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:]]
    lines = [*_table(drills), "", *_kinds(drills), "", *_machine(drills[0])]
    text = "<!-- table: faults -->\n" + "\n".join(lines) + "\n<!-- end -->"
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(r"<!-- table: faults -->.*<!-- end -->", lambda _: text, page, flags=re.DOTALL), "utf-8")
    return 0


def _table(drills: Sequence[Mapping[str, Any]]) -> list[str]:
    """One column a drill."""
    names = [drill["workload"].split()[-1] for drill in drills]
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(drills)]
    lines.append("| seed | " + " | ".join(str(drill["seed"]) for drill in drills) + " |")
    for name in _COLUMNS:
        lines.append(f"| {name} | " + " | ".join(f"{drill['figures'][name]:,g}" for drill in drills) + " |")
    return lines


def _kinds(drills: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each kind of fault of each drill."""
    lines = ["| fault | drill | times | runs stalled | p50, s | p99, s | longest, s |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for drill in drills:
        for name, found in drill["spreads"].items():
            times = " | ".join(f"{found[key]:.2f}" if key in found else "" for key in ("p50", "p99", "max"))
            lines.append(
                f"| {name} | {drill['workload'].split()[-1]} | {found['count']:g} | {found['stalled']:g} | {times} |"
            )
    return lines


def _machine(drill: Mapping[str, Any]) -> list[str]:
    machine, versions = drill["machine"], drill["versions"]
    told = ", ".join(f"{name} {value}" for name, value in sorted(versions.items()))
    return [
        f"Machine: {machine['cores']} cores ({machine['processor']}), {machine['memory'] / 2**30:.0f} GiB, "
        f"{machine['system']}, fdatasync {machine['fdatasync_ms']} ms. Versions: {told}."
    ]


if __name__ == "__main__":
    sys.exit(main())
