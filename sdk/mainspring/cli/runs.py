"""The commands that start, follow, read and control runs."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

import typer

from mainspring.cli.connection import DATA_DIR, AsJson, DataDir, connect
from mainspring.cli.output import EventPrinter, local_time, print_json, print_table
from mainspring.cli.reading import read_json
from mainspring.client import Client, Event

runs = typer.Typer(help="Read, follow and control runs.", no_args_is_help=True, rich_markup_mode="markdown")

RunId = Annotated[str, typer.Argument(metavar="RUN_ID")]
Session = Annotated[str, typer.Option("--session", metavar="S", help="The conversation that the run is part of.")]
Data = Annotated[str, typer.Option("--data", metavar="JSON", help="A JSON value, @FILE, or - to read it.")]


def register(app: typer.Typer) -> None:
    """Adds these commands."""
    app.command()(run)
    app.add_typer(runs, name="runs")


def run(
    agent: Annotated[str, typer.Argument(metavar="AGENT")],
    *,
    run_input: Annotated[
        str, typer.Option("--input", metavar="JSON", help="A JSON object, @FILE, or - to read it.")
    ] = "{}",
    session: Session = "",
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Stay until the run has ended.")] = True,
    as_json: AsJson = False,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Starts a run and prints its events as they arrive, then the answer.

    Examples: `mainspring run lookup --input '{"value": 42}'`,
    `mainspring run lookup --input @input.json --json`.

    Exit codes: 0 completed, 1 failed, cancelled or timed out, 2 wrong usage. With --json one frame a line.
    """
    value = _read_input(run_input)
    ended = asyncio.run(_run(connect(data_dir), agent, value=value, session=session, follow=follow, as_json=as_json))
    if ended is not None and ended.type != "agent_completed":
        raise typer.Exit(1)


@runs.command("list")
def list_runs(
    *,
    session: Session = "",
    agent: Annotated[str, typer.Option(metavar="NAME")] = "",
    state: Annotated[str, typer.Option(metavar="STATE", help="QUEUED, RUNNING, COMPLETED, FAILED, …")] = "",
    limit: Annotated[int, typer.Option(min=1, max=500)] = 20,
    as_json: AsJson = False,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Lists your runs, newest first.

    Example: `mainspring runs list --state RUNNING`
    """
    query = {"session_id": session, "agent": agent, "state": state, "page_size": str(limit)}
    page = asyncio.run(_call(connect(data_dir), "GET", path="/v1/runs", query={k: v for k, v in query.items() if v}))
    if as_json:
        print_json(page)
        return
    rows = (
        [
            run["run_id"],
            run["agent"],
            run["state"],
            local_time(run.get("create_time", "")),
            # A run that was given no session has one of its own, of the same name.
            "" if run["session_id"] == run["run_id"] else run["session_id"],
        ]
        for run in page["runs"]
    )
    print_table(["RUN", "AGENT", "STATE", "CREATED", "SESSION"], rows, empty="No runs.")
    if page.get("next_page_token"):
        sys.stderr.write("There are more: --limit shows up to 500.\n")


@runs.command("get")
def get_run(run_id: RunId, *, data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """Shows a run as it stands, and under `holds` why it does not go on.

    Example: `mainspring runs get 0193a3f0-…`
    """
    found = asyncio.run(_call(connect(data_dir), "GET", path=f"/v1/runs/{run_id}:explain"))
    run = found["run"] | ({"holds": found["holds"], "executor_id": found["executor_id"]} if found["holds"] else {})
    print_json(run, is_line=as_json)


@runs.command("explain")
def explain(run_id: RunId, *, data_dir: DataDir = DATA_DIR, as_json: AsJson = False) -> None:
    """Says why a run does not go on, or what it is doing.

    Example: `mainspring runs explain 0193a3f0-…`
    """
    found = asyncio.run(_call(connect(data_dir), "GET", path=f"/v1/runs/{run_id}:explain"))
    if as_json:
        print_json(found, is_line=True)
        return
    sys.stdout.write(f"{run_id} {found['run']['state']}\n")
    for hold in found["holds"]:
        until = f" (until {local_time(hold['until'])})" if hold.get("until") else ""
        sys.stdout.write(f"  {hold['kind']}: {hold['detail']}{until}\n")


@runs.command("events")
def events(
    run_id: RunId,
    *,
    after_seq: Annotated[int, typer.Option(min=0, metavar="N", help="Only events after this number.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", help="Stay for the events to come.")] = False,
    as_json: AsJson = False,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Prints a run's log; with --json one event a line.

    Example: `mainspring runs events 0193a3f0-… --follow --after-seq 3`
    """
    asyncio.run(_events(connect(data_dir), run_id, after_seq=after_seq, follow=follow, as_json=as_json))


@runs.command("cancel")
def cancel(
    run_id: RunId,
    *,
    reason: Annotated[str, typer.Option(metavar="TEXT")] = "",
    as_json: AsJson = False,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Asks for the end of a run; the log tells when it has ended.

    Example: `mainspring runs cancel 0193a3f0-… --reason "no longer needed"`
    """
    body = {"reason": reason} if reason else {}
    _change(data_dir, f"/v1/runs/{run_id}:cancel", body=body, as_json=as_json, told=f"{run_id} will be cancelled")


@runs.command("pause")
def pause(
    run_id: RunId,
    *,
    reason: Annotated[str, typer.Option(metavar="TEXT")] = "",
    as_json: AsJson = False,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Asks a run to stand still between two steps, until it is resumed.

    Example: `mainspring runs pause 0193a3f0-… --reason "a look first"`
    """
    body = {"reason": reason} if reason else {}
    _change(data_dir, f"/v1/runs/{run_id}:pause", body=body, as_json=as_json, told=f"{run_id} will be paused")


@runs.command("resume")
def resume(run_id: RunId, *, as_json: AsJson = False, data_dir: DataDir = DATA_DIR) -> None:
    """Lets a paused run go on.

    Example: `mainspring runs resume 0193a3f0-…`
    """
    _change(data_dir, f"/v1/runs/{run_id}:resume", body={}, as_json=as_json, told=f"{run_id} goes on")


@runs.command("signal")
def signal(
    run_id: RunId,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    *,
    data: Data = "null",
    as_json: AsJson = False,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Sends a run a named signal, which is kept until the run takes it.

    Example: `mainspring runs signal 0193a3f0-… delivered --data '{"parcel": 7}'`
    """
    body = {"name": name, "data": read_json(data, option="--data")}
    _change(data_dir, f"/v1/runs/{run_id}:signal", body=body, as_json=as_json, told=f"{run_id} has the signal {name}")


@runs.command("retry")
def retry(run_id: RunId, *, as_json: AsJson = False, data_dir: DataDir = DATA_DIR) -> None:
    """Starts a run that failed, timed out or was cancelled again, as a new run.

    Example: `mainspring runs retry 0193a3f0-…`
    """
    _change(data_dir, f"/v1/runs/{run_id}:retry", body={}, as_json=as_json)


@runs.command("fork")
def fork(
    run_id: RunId,
    seq: Annotated[int, typer.Argument(metavar="SEQ", min=1, help="The event after which it goes its own way.")],
    *,
    session: Session = "",
    version: Annotated[str, typer.Option(metavar="V", help="Another version of the agent.")] = "",
    as_json: AsJson = False,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Starts a new run from an event of another; what was done by then is taken over, not done again.

    Example: `mainspring runs fork 0193a3f0-… 7`
    """
    options = {name: value for name, value in (("session_id", session), ("version", version)) if value}
    _change(data_dir, f"/v1/runs/{run_id}:fork", body={"seq": seq, **options}, as_json=as_json)


def _change(data_dir: Path, path: str, *, body: dict[str, Any], as_json: bool, told: str = "") -> None:
    """Asks for a change and says what becomes of it; `told` is empty where that is a new run."""
    answer = asyncio.run(_call(connect(data_dir), "POST", path=path, body=body))
    if as_json:
        print_json(answer, is_line=True)
        return
    run_id = answer["run_id"]
    told = told or f"{run_id} {answer['state']}"
    sys.stdout.write(f"{told}: mainspring runs events {run_id} --follow\n")


def _read_input(text: str) -> dict[str, Any]:
    value = read_json(text, option="--input")
    if not isinstance(value, dict):
        raise typer.BadParameter('it is JSON, but not an object such as {"value": 42}.', param_hint="--input")
    return value


async def _run(
    client: Client, agent: str, *, value: dict[str, Any], session: str, follow: bool, as_json: bool
) -> Event | None:
    async with client:
        if not follow:
            started = await client.start(agent, value, session_id=session)
            if as_json:
                print_json({"run_id": started.run_id, "state": started.state})
            else:
                sys.stdout.write(f"{started.run_id} {started.state}\n")
            return None
        printer, run_id = EventPrinter(), ""
        on_text = None if as_json else printer.show_text
        stream = client.stream(agent, value, session_id=session, on_text=on_text, with_sub_runs=True)
        async with aclosing(stream):
            async for event in stream:
                if as_json:
                    print_json(event.frame, is_line=True)
                else:
                    if not run_id:
                        sys.stdout.write(f"run {event.run_id}\n")
                    printer.show(event)
                run_id = run_id or event.run_id
                if event.is_terminal and event.run_id == run_id:
                    break
        if event.type == "agent_completed" and not as_json:
            print_json(event.data.get("result"))
        return event


async def _events(client: Client, run_id: str, *, after_seq: int, follow: bool, as_json: bool) -> None:
    printer = EventPrinter()
    on_text = None if as_json else printer.show_text
    read = client.events(run_id, after_seq=after_seq)
    if follow:
        read = client.follow(run_id, after_seq=after_seq, on_text=on_text, with_sub_runs=True)
    async with client, aclosing(read) as found:
        async for event in found:
            if as_json:
                print_json(event.frame, is_line=True)
            else:
                printer.show(event)


async def _call(
    client: Client, method: str, *, path: str, **given: Any
) -> dict[str, Any]:  # Any: as Client.request takes
    async with client:
        return await client.request(method, path, **given)
