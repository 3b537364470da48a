"""The commands about what exists: agents, tools and schedules."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import quote

import typer
import yaml

from mainspring.cli.connection import DATA_DIR, AsJson, DataDir, connect
from mainspring.cli.output import print_json, print_table
from mainspring.client import ApiError, Client
from mainspring.embedded.launch import StartError

# The line `---` begins a document, whatever stands around it.
_DOCUMENT_START: Final = re.compile(r"^---(?=\s|$)", re.MULTILINE)
# A line that says something, be it wrong.
_CONTENT: Final = re.compile(r"^\s*[^\s#]", re.MULTILINE)

agents = typer.Typer(help="Look at agents.", no_args_is_help=True, rich_markup_mode="markdown")
schedules = typer.Typer(help="Look at schedules.", no_args_is_help=True, rich_markup_mode="markdown")
tools = typer.Typer(help="Look at tools.", no_args_is_help=True, rich_markup_mode="markdown")


def register(app: typer.Typer) -> None:
    """Adds these commands."""
    app.command()(apply)
    app.add_typer(agents, name="agents")
    app.add_typer(schedules, name="schedules")
    app.add_typer(tools, name="tools")


def apply(
    files: Annotated[
        list[str],
        typer.Option(
            "-f", "--file", metavar="FILE", help="YAML or JSON, of one or several documents; a folder; - to read it."
        ),
    ],
    *,
    as_json: AsJson = False,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Registers agents and schedules from their specifications. The same again changes nothing.

    Examples: `mainspring apply -f agent.yaml`, `mainspring apply -f agents/`, `cat agent.yaml | mainspring apply -f -`
    """
    documents = [found for name in files for found in _documents(name)]
    if not documents:
        raise StartError(f"{', '.join(files)} holds no document: nothing was applied.")
    asyncio.run(_apply(connect(data_dir), documents, as_json=as_json))


@agents.command("list")
def list_agents(
    *,
    capability: Annotated[str, typer.Option(metavar="C")] = "",
    text: Annotated[str, typer.Option(metavar="T", help="Part of the name or description.")] = "",
    label: Annotated[list[str] | None, typer.Option(metavar="NAME:VALUE")] = None,
    as_json: AsJson = False,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Lists the newest version of each agent.

    Example: `mainspring agents list --capability lookup`
    """
    query = [(name, value) for name, value in (("capability", capability), ("text", text)) if value]
    query += [("label", value) for value in label or ()]
    found = asyncio.run(_pages(connect(data_dir), "agents", query=query))
    if as_json:
        print_json(found)
        return
    rows = (
        [agent["name"], agent["version"], ", ".join(agent["capabilities"]), agent["description"]] for agent in found
    )
    print_table(["NAME", "VERSION", "CAPABILITIES", "DESCRIPTION"], rows, empty="No agents: mainspring apply -f FILE")


@agents.command("get")
def get_agent(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    *,
    version: Annotated[str, typer.Option(metavar="V", help="Which version; the newest where not given.")] = "",
    as_json: AsJson = False,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Shows an agent with its specification.

    Example: `mainspring agents get lookup --version 1`
    """
    query = {"version": version} if version else {}
    found = asyncio.run(_one(connect(data_dir), f"/v1/agents/{name}", query=query))
    if as_json:
        print_json(found)
    else:
        sys.stdout.write(yaml.safe_dump(found, sort_keys=False, allow_unicode=True))


@schedules.command("list")
def list_schedules(*, as_json: AsJson = False, data_dir: DataDir = DATA_DIR) -> None:
    """Lists the schedules, when each fires next and what came of the last time.

    Example: `mainspring schedules list`
    """
    found = asyncio.run(_pages(connect(data_dir), "schedules", query=[]))
    if as_json:
        print_json(found)
        return
    rows = (
        [
            *(entry["name"], entry["cron"], entry["time_zone"], entry["agent"]),
            "paused" if entry["paused"] else entry.get("next_time", "never"),
            entry["last_error"]["reason"] if "last_error" in entry else entry.get("last_run_id", ""),
        ]
        for entry in found
    )
    print_table(["NAME", "CRON", "ZONE", "AGENT", "NEXT", "LAST"], rows, empty="No schedules: mainspring apply -f FILE")


@schedules.command("get")
def get_schedule(
    name: Annotated[str, typer.Argument(metavar="NAME")], *, as_json: AsJson = False, data_dir: DataDir = DATA_DIR
) -> None:
    """Shows a schedule.

    Example: `mainspring schedules get nightly`
    """
    found = asyncio.run(_one(connect(data_dir), f"/v1/schedules/{quote(name, safe='')}", query={}))
    if as_json:
        print_json(found)
    else:
        sys.stdout.write(yaml.safe_dump(found, sort_keys=False, allow_unicode=True))


@schedules.command("delete")
def delete_schedule(name: Annotated[str, typer.Argument(metavar="NAME")], *, data_dir: DataDir = DATA_DIR) -> None:
    """Deletes a schedule; runs that it has started go on.

    Example: `mainspring schedules delete nightly`
    """
    asyncio.run(_delete(connect(data_dir), f"/v1/schedules/{quote(name, safe='')}"))
    sys.stdout.write(f"schedule {name} is deleted\n")


@tools.command("list")
def list_tools(*, as_json: AsJson = False, data_dir: DataDir = DATA_DIR) -> None:
    """Lists the tools that your agents may call.

    Example: `mainspring tools list`
    """
    found = asyncio.run(_pages(connect(data_dir), "tools", query=[]))
    if as_json:
        print_json(found)
        return
    rows = ([tool["name"], tool["effect"], "yes" if tool["shared"] else "", _first_line(tool)] for tool in found)
    print_table(["NAME", "EFFECT", "SHARED", "DESCRIPTION"], rows, empty="No tools: mainspring worker MODULE")


def _documents(name: str) -> Iterator[tuple[str, str]]:
    """The text of each document with where it stands."""
    if name == "-":
        yield from _split("standard input", sys.stdin.read())
        return
    path = Path(name)
    try:
        if path.is_dir():
            for file in sorted(p for p in path.rglob("*") if p.suffix in (".yaml", ".yml", ".json")):
                yield from _split(str(file), file.read_text(encoding="utf-8"))
        else:
            yield from _split(name, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"{name} can't be read: {error}. Nothing was applied.") from error


def _split(where: str, text: str) -> Iterator[tuple[str, str]]:
    """Each document as it is written, for the registry alone reads it; empty lines keep the numbers of the lines."""
    found = []
    lines_before = 0
    for part in _DOCUMENT_START.split(text):
        if _CONTENT.search(part):
            found.append("\n" * lines_before + part)
        lines_before += part.count("\n")
    for number, document in enumerate(found, start=1):
        yield f"{where}#{number}" if len(found) > 1 else where, document


async def _apply(client: Client, documents: list[tuple[str, str]], *, as_json: bool) -> None:
    async with client:
        for where, document in documents:
            try:
                answer = await client.apply(document)
            except ApiError as error:
                text = f"{where} was refused; those before it were applied. {error}"
                raise ApiError(text, code=error.code, reason=error.reason, metadata=error.metadata) from error
            if as_json:
                print_json(answer, is_line=True)
            elif "cron" in answer:
                when = "is paused" if answer["paused"] else f"fires next at {answer.get('next_time', 'no time')}"
                sys.stdout.write(f"schedule {answer['name']} {when}\n")
            else:
                agent, what = answer["agent"], "is new" if answer["created"] else "is as it was"
                sys.stdout.write(f"agent {agent['name']} version {agent['version']} {what}\n")


async def _one(client: Client, path: str, *, query: dict[str, str]) -> dict[str, Any]:
    async with client:
        return await client.request("GET", path, query=query)


async def _delete(client: Client, path: str) -> None:
    async with client:
        await client.request("DELETE", path)


async def _pages(client: Client, noun: str, *, query: list[tuple[str, str]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    page_token = ""
    async with client:
        while True:
            position = [("page_token", page_token)] if page_token else []
            page = await client.request("GET", f"/v1/{noun}", query=[*query, *position])
            found += page[noun]
            page_token = page.get("next_page_token", "")
            if not page_token:
                return found


def _first_line(tool: dict[str, Any]) -> str:
    lines = str(tool["description"]).splitlines()
    return lines[0] if lines else ""
