"""The tools of the cost optimizer. They only read a file, so all are pure and may be called again after a crash."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

from mainspring import ToolError, tool

from examples.cost_optimizer import savings
from examples.cost_optimizer.bill import BillError, Dimension, read_charges, summarize, total_by


@tool(name="cost.read-bill", effect="pure", timeout=120)
def read_bill(bill: str) -> dict[str, Any]:
    """Reads a whole bill, checks every line of it, and says what it spans.

    Args:
        bill: The path of the CSV file.
    """
    with _told_as_tool_error():
        summary = summarize(read_charges(Path(bill)))
    return {
        "lines": summary.lines,
        "days": summary.days,
        "first_day": summary.first_day,
        "last_day": summary.last_day,
        "total_usd": savings.dollars(summary.cost),
    }


@tool(name="cost.aggregate", effect="pure", timeout=120)
def aggregate(bill: str, by: Dimension) -> list[dict[str, Any]]:
    """Adds a bill up by account, service or region, the dearest first.

    Args:
        bill: The path of the CSV file.
        by: What to add up by.
    """
    with _told_as_tool_error():
        totals = total_by(read_charges(Path(bill)), by)
    whole = sum(totals.values()) or Decimal(1)
    return [
        {"name": name, "cost_usd": savings.dollars(cost), "share": float(round(cost / whole, 4))}
        for name, cost in totals.items()
    ]


@tool(name="cost.find-savings", effect="pure", timeout=120)
def find_savings(bill: str) -> dict[str, Any]:
    """Finds waste in a bill and says what to do about it, and what that saves a month.

    Args:
        bill: The path of the CSV file.
    """
    with _told_as_tool_error():
        summary = summarize(read_charges(Path(bill)))
        findings = savings.find(read_charges(Path(bill)))
    saved = savings.monthly(sum((finding.saving for finding in findings), Decimal(0)), days=summary.days)
    cost = savings.monthly(summary.cost, days=summary.days)
    return {
        "impact": {
            "monthly_cost_usd": savings.dollars(cost),
            "monthly_saving_usd": savings.dollars(saved),
            "yearly_saving_usd": savings.dollars(saved * 12),
            "saving_share": float(round(saved / cost, 4)) if cost else 0.0,
        },
        "confidence": float(round(savings.confidence(findings), 2)),
        "recommendations": savings.recommend(findings, days=summary.days),
    }


@contextmanager
def _told_as_tool_error() -> Iterator[None]:
    """The run's log names the file and the line, as whoever started the run needs them."""
    try:
        yield
    except BillError as error:
        raise ToolError(
            str(error),
            code="INVALID_ARGUMENT",
            reason="BILL_MALFORMED",
            metadata={"file": error.file, "line": error.line},
        ) from error
