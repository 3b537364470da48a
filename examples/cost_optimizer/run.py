"""Runs the cost optimizer from nothing: starts the platform, reads a bill, prints the events and the answer, stops.

python examples/cost_optimizer/run.py [BILL]
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

from mainspring import ApiError, Client, Event
from mainspring.cli.output import EventPrinter
from mainspring.dev import StartError, stack
from mainspring.dev.screen import Screen
from mainspring.narration import error_text
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DATA_DIR = ROOT / ".mainspring" / "run"
TOOLS = "examples.cost_optimizer.tools"


def main() -> int:
    """Exit code 0: the answer was printed. 1: it was not, and why is the last line."""
    bill = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("BILL") or HERE / "bill.csv").absolute()
    if not bill.is_file():
        sys.stderr.write(f"error: {bill} is not a file: name a bill in CSV, or none to use the example's own.\n")
        return 1
    console = Console(highlight=False)
    try:
        ended = asyncio.run(optimize(bill, console))
    except (StartError, ApiError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    if ended.type != "agent_completed":
        sys.stderr.write(f"error: {error_text(ended.data.get('error') or {})}\n")
        return 1
    print_answer(ended.data["result"], console)
    return 0


async def optimize(bill: Path, console: Console) -> Event:
    """Runs the agent on a stack of its own and returns the terminal event."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    witness = Screen(console, least_level="error")
    witness.starting(DATA_DIR)
    async with (
        stack(data_dir=DATA_DIR, workers=[TOOLS], extra_env={"PYTHONPATH": path}, witness=witness) as running,
        Client(running.gateway, running.token) as client,
    ):
        await client.apply((HERE / "agent.yaml").read_text(encoding="utf-8"))
        console.print(f"\nThe agent cost-optimizer reads {bill}\n")
        printer = EventPrinter()
        async with aclosing(client.stream("cost-optimizer", {"bill": str(bill)})) as events:
            async for event in events:
                printer.show(event)
                if event.is_terminal:
                    break
        return event


def print_answer(answer: Mapping[str, Any], console: Console) -> None:
    """The answer as tables. Any: JSON."""
    bill, impact = answer["bill"], answer["impact"]
    spent = Table(title=f"{bill['lines']:,} lines, {bill['first_day']} to {bill['last_day']}", title_justify="left")
    spent.add_column("Service")
    spent.add_column("US dollars", justify="right")
    spent.add_column("Share", justify="right")
    for row in answer["by_service"]:
        spent.add_row(row["name"], f"{row['cost_usd']:,.2f}", f"{row['share']:.1%}")
    console.print("\n", spent)
    todo = Table(title="What to do", title_justify="left")
    todo.add_column("Recommendation")
    todo.add_column("Saves a month", justify="right")
    todo.add_column("Confidence", justify="right")
    for row in answer["recommendations"]:
        todo.add_row(row["action"], f"{row['monthly_saving_usd']:,.2f}", f"{row['confidence']:.0%}")
    console.print(todo)
    console.print(
        f"[bold green]{impact['monthly_saving_usd']:,.2f} of {impact['monthly_cost_usd']:,.2f} US dollars a month "
        f"can be saved ({impact['saving_share']:.1%}), {impact['yearly_saving_usd']:,.2f} a year; "
        f"confidence {answer['confidence']:.0%}.[/]"
    )


if __name__ == "__main__":
    sys.exit(main())
