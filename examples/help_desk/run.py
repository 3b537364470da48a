"""Runs the help desk from nothing: a model's words as they come, a question to you, and a hand-over to another agent.

python examples/help_desk/run.py [--yes | --no] [WISH]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

from mainspring import ApiError, Client, Event
from mainspring.cli.output import EventPrinter
from mainspring.dev import StartError, stack
from mainspring.dev.screen import Screen
from mainspring.narration import error_text
from rich.console import Console

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DATA_DIR = ROOT / ".mainspring" / "help_desk"
TOOLS = "examples.help_desk.tools"
WISH = "My order 1002 arrived broken, I want my money back."


def main() -> int:
    """Exit code 0: the desk has answered. 1: it has not, and why is the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wish", nargs="?", default=WISH, help="what the customer writes")
    parser.add_argument(
        "--yes", dest="answer", action="store_const", const="allow", default="", help="say yes without being asked"
    )
    parser.add_argument("--no", dest="answer", action="store_const", const="deny", help="say no without being asked")
    asked = parser.parse_args()
    console = Console(highlight=False)
    try:
        ended = asyncio.run(serve(asked.wish, asked.answer, console=console))
    except (StartError, ApiError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    if ended.type != "agent_completed":
        sys.stderr.write(f"error: {error_text(ended.data.get('error') or {})}\n")
        return 1
    console.print(f"\n[bold green]{ended.data['result']}[/]")
    return 0


async def serve(wish: str, answer: str, *, console: Console) -> Event:
    """Runs the agents on a stack of their own, beside the stand-in for a model, and returns the terminal event."""
    sys.path.insert(0, str(ROOT))
    from examples.help_desk.model import model_server

    witness = Screen(console, least_level="error")
    witness.starting(DATA_DIR)
    async with AsyncExitStack() as opened:
        variables = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
        # Whom the provider `openai` stands for; a specification could say it itself, with `base_url`.
        variables["OPENAI_BASE_URL"] = await opened.enter_async_context(model_server())
        variables["MAINSPRING_CREDENTIAL_OPENAI"] = "none"
        running = await opened.enter_async_context(
            stack(data_dir=DATA_DIR, workers=[TOOLS], extra_env=variables, witness=witness)
        )
        client = await opened.enter_async_context(Client(running.gateway, running.token))
        for name in ("refunds", "front_desk"):
            await client.apply((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
        console.print(f"\nThe customer: {wish}\n")
        printer = EventPrinter(console)
        async with aclosing(client.stream("front-desk", {"text": wish}, on_text=printer.show_text)) as events:
            async for event in events:
                printer.show(event)
                if event.type == "approval_requested":
                    decision = answer or await asyncio.to_thread(ask, event.data["title"], console)
                    await client.resolve(event.data["approval_id"], decision)
        return event


def ask(title: str, console: Console) -> str:
    """What the person at the terminal decides."""
    said = console.input(f"\n[bold yellow]{title}[/] \\[y/n] ")
    return "allow" if said.strip().lower() in ("y", "yes") else "deny"


if __name__ == "__main__":
    sys.exit(main())
