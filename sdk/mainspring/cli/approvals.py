"""The commands about questions to people: which are open, and their answers."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mainspring.cli.connection import DATA_DIR, AsJson, DataDir, connect
from mainspring.cli.output import local_time, print_json, print_table
from mainspring.cli.reading import read_json
from mainspring.client import Client
from mainspring.narration import short

approvals = typer.Typer(help="Answer what runs ask people.", no_args_is_help=True, rich_markup_mode="markdown")

ApprovalId = Annotated[str, typer.Argument(metavar="APPROVAL_ID")]
Data = Annotated[
    str, typer.Option("--data", metavar="JSON", help="What the answer brings: a JSON value, @FILE, or - to read it.")
]


def register(app: typer.Typer) -> None:
    """Adds these commands."""
    app.add_typer(approvals, name="approvals")


@approvals.command("list")
def list_approvals(
    *,
    run: Annotated[str, typer.Option(metavar="RUN_ID", help="Only those of this run.")] = "",
    every: Annotated[bool, typer.Option("--all", help="Also those that are over.")] = False,
    as_json: AsJson = False,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Lists the approvals that wait for an answer of yours, newest first.

    Example: `mainspring approvals list --all`
    """
    query = {"run_id": run, "include_resolved": "true" if every else "", "page_size": "500"}
    page = asyncio.run(_list(connect(data_dir), {name: value for name, value in query.items() if value}))
    if as_json:
        print_json(page)
        return
    rows = (
        [
            approval["approval_id"],
            approval["agent"],
            approval["decision"],
            approval["role"],
            local_time(approval.get("expires_time", "")),
            " ".join(filter(None, [approval["title"], short(approval["arguments"]) if approval["arguments"] else ""])),
        ]
        for approval in page["approvals"]
    )
    print_table(["APPROVAL", "AGENT", "DECISION", "ROLE", "EXPIRES", "QUESTION"], rows, empty="No approvals.")


@approvals.command("allow")
def allow(
    approval_id: ApprovalId, *, data: Data = "null", as_json: AsJson = False, data_dir: DataDir = DATA_DIR
) -> None:
    """Says yes; the first answer counts.

    Example: `mainspring approvals allow 0193a3f0-….7 --data '{"limit": 100}'`
    """
    _resolve(data_dir, approval_id, decision="allow", data=data, as_json=as_json)


@approvals.command("deny")
def deny(
    approval_id: ApprovalId, *, data: Data = "null", as_json: AsJson = False, data_dir: DataDir = DATA_DIR
) -> None:
    """Says no; the first answer counts.

    Example: `mainspring approvals deny 0193a3f0-….7`
    """
    _resolve(data_dir, approval_id, decision="deny", data=data, as_json=as_json)


def _resolve(data_dir: Path, approval_id: str, *, decision: str, data: str, as_json: bool) -> None:
    value = read_json(data, option="--data")
    answer = asyncio.run(_answer(connect(data_dir), approval_id, decision=decision, data=value))
    if as_json:
        print_json(answer, is_line=True)
    else:
        sys.stdout.write(f"{approval_id} {decision}: mainspring runs events {answer['run_id']} --follow\n")


async def _list(client: Client, query: dict[str, str]) -> dict[str, Any]:
    async with client:
        return await client.list_approvals(**query)


async def _answer(client: Client, approval_id: str, *, decision: str, data: Any) -> dict[str, Any]:  # Any: JSON
    async with client:
        return await client.resolve(approval_id, decision, data=data)
