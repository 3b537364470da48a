"""The commands that run the platform or a part of it: dev, worker, migrate, token, webhook-key."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from mainspring.cli.connection import DATA_DIR, DataDir, find
from mainspring.client import Client
from mainspring.embedded.launch import StartError

if TYPE_CHECKING:
    from mainspring.dev.screen import Screen

TOKEN_SECONDS_MAX: Final = 365 * 24 * 3600

_EXIT_IN_A_HURRY: Final = 130
_DRAIN_SECONDS: Final = 10.0

Modules = Annotated[list[str] | None, typer.Argument(metavar="[MODULE]...", help="Python modules with tools.")]


def register(app: typer.Typer) -> None:
    """Adds these commands."""
    for command in (dev, worker, migrate, token, webhook_key):
        app.command()(command)


def dev(
    modules: Modules = None,
    *,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="The gateway's port; 0: any that is free.")] = 8080,
    data_dir: DataDir = DATA_DIR,
    ready_file: Annotated[Path | None, typer.Option(metavar="F", help="Also write where everything is into F.")] = None,
    worker: Annotated[list[str] | None, typer.Option(metavar="MODULE", help="The same as MODULE.")] = None,
    no_worker: Annotated[
        bool, typer.Option("--no-worker", help="Start no worker: no tools, not even diagnostics.")
    ] = False,
    replicas: Annotated[str, typer.Option(metavar="P=N,…", help="More than one of a process.")] = "",
    log_level: Annotated[
        str, typer.Option(metavar="LEVEL", help="Least level shown: debug, info, warning, error.")
    ] = "warning",
) -> None:
    """Starts the whole platform here, with PostgreSQL, Valkey and a worker, and keeps it running.

    DATABASE_URL and REDIS_URL name servers to use instead of the embedded ones. A process that dies is started again.
    Ctrl-C stops everything in order; the data stays in the data folder.

    Examples: `mainspring dev`, `mainspring dev my_tools --port 0`,
    `mainspring dev --replicas state=2,gateway=2 --data-dir /tmp/second --port 8081`

    Exit codes: 0 stopped as asked, 1 could not start, 2 wrong usage.
    """
    from mainspring.dev.logs import LEVELS
    from mainspring.dev.plan import parse_replicas

    if log_level not in LEVELS:
        raise typer.BadParameter(f"{log_level!r} is none of {', '.join(LEVELS)}.", param_hint="--log-level")
    try:
        counts = parse_replicas(replicas)
    except StartError as error:
        raise typer.BadParameter(str(error), param_hint="--replicas") from error
    chosen = None if no_worker else [*(modules or ()), *(worker or ())]
    try:
        asyncio.run(_dev(data_dir, port, ready_file=ready_file, workers=chosen, replicas=counts, log_level=log_level))
    except asyncio.CancelledError:
        raise typer.Exit(0) from None


def worker(
    modules: Annotated[list[str], typer.Argument(metavar="MODULE...", help="Python modules with tools.")],
    *,
    data_dir: DataDir = DATA_DIR,
    ready_file: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Serves the tools of Python modules until it is stopped.

    The dispatcher is MAINSPRING_DISPATCHER_TARGET, else what the gateway says of it; the token needs the role operator.

    Example: `mainspring worker my_tools other.tools`

    Exit codes: 0 stopped as asked, 1 failed, 2 wrong usage.
    """
    # As for `python -m`: modules are found where the command is given.
    sys.path.insert(0, "")
    from mainspring.worker import new_loop

    with asyncio.Runner(loop_factory=new_loop) as runner:
        code = runner.run(_worker(modules, data_dir, ready_file=ready_file))
    raise typer.Exit(code)


def migrate() -> None:
    """Brings the database to the version of this code. Forward only, and safe beside the previous release.

    MAINSPRING_OWNER_DATABASE_URL names the database as a role that may create roles and schemas. What the services
    connect with is MAINSPRING_STATE_DATABASE_URL and MAINSPRING_REGISTRY_DATABASE_URL, each with the password that its
    role shall have; without them the roles get those that `mainspring dev` uses for this owner.

    Example: `MAINSPRING_OWNER_DATABASE_URL=postgresql://postgres:…@db/mainspring mainspring migrate`

    Exit codes: 0 done, 1 failed.
    """
    from mainspring.dev.plan import WITH_DATABASE, role_url

    owner_url = os.environ.get("MAINSPRING_OWNER_DATABASE_URL", "")
    if not owner_url:
        raise StartError("MAINSPRING_OWNER_DATABASE_URL is not set: it names the database to migrate, as its owner.")
    for service in WITH_DATABASE:
        url = os.environ.get(f"MAINSPRING_{service.upper()}_DATABASE_URL") or role_url(
            owner_url, f"mainspring_{service}"
        )
        command = [sys.executable, "-m", f"mainspring_{service}", "migrate"]
        done = subprocess.run(command, env={**os.environ, "MAINSPRING_DATABASE_URL": url}, check=False)
        if done.returncode != 0:
            raise StartError(f"The migration of {service} failed with exit code {done.returncode}; see above.")
        sys.stdout.write(f"{service}: migrated\n")


def token(
    *,
    tenant: Annotated[str, typer.Option(metavar="T")] = "",
    user: Annotated[str, typer.Option(metavar="U")] = "",
    role: Annotated[
        list[str] | None, typer.Option(metavar="R", help="viewer, runner, operator or admin; again for more.")
    ] = None,
    ttl: Annotated[
        int, typer.Option(metavar="S", min=1, max=TOKEN_SECONDS_MAX, help="Seconds until it expires.")
    ] = 3600,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Prints a token, signed with MAINSPRING_AUTH_SECRET, else with the secret of the `mainspring dev` of this folder.

    For `mainspring dev` the user is `developer` of the tenant `dev`, an admin, where nothing else is said.

    Examples: `mainspring token`, `mainspring token --tenant acme --user ann --role runner --ttl 600`
    """
    from mainspring.tokens import ROLES, user_token

    secret = os.environ.get("MAINSPRING_AUTH_SECRET", "")
    if not secret:
        from mainspring.dev.folder import Folder

        secret = Folder(data_dir).known_secrets().auth
        tenant, user, role = tenant or "dev", user or "developer", role or ["admin"]
        sys.stderr.write(f"(signed with the development secret in {data_dir})\n")
    missing = [f"--{name}" for name, value in (("tenant", tenant), ("user", user), ("role", role)) if not value]
    if missing:
        raise typer.BadParameter(f"{', '.join(missing)} must be given.")
    if unknown := set(role or ()) - set(ROLES):
        raise typer.BadParameter(
            f"{', '.join(sorted(unknown))}: no such role; {', '.join(ROLES)}.", param_hint="--role"
        )
    sys.stdout.write(user_token(secret, tenant=tenant, user=user, roles=role or (), ttl_seconds=ttl) + "\n")


def webhook_key(*, tenant: Annotated[str, typer.Option(metavar="T")] = "dev", data_dir: DataDir = DATA_DIR) -> None:
    """Prints the key with which receivers check the webhooks of a tenant's runs (see standardwebhooks.com).

    It follows from MAINSPRING_SERVICE_SECRET, else from the secret of the `mainspring dev` of this folder.

    Example: `mainspring webhook-key --tenant acme`
    """
    from mainspring import tokens

    secret = os.environ.get("MAINSPRING_SERVICE_SECRET", "")
    if not secret:
        from mainspring.dev.folder import Folder

        secret = Folder(data_dir).known_secrets().service
    sys.stdout.write(tokens.webhook_key(secret, tenant=tenant) + "\n")


async def _dev(
    data_dir: Path,
    port: int,
    *,
    ready_file: Path | None,
    workers: list[str] | None,
    replicas: Mapping[str, int],
    log_level: str,
) -> None:
    from rich.console import Console

    from mainspring.dev import logs, stack
    from mainspring.dev.screen import Screen

    screen = Screen(Console(highlight=False), least_level=log_level)
    _stop_on_signals(screen)
    started = time.monotonic()
    screen.starting(data_dir)
    async with stack(
        data_dir=data_dir,
        port=port,
        replicas=replicas,
        workers=workers,
        log_level="debug" if log_level == "debug" else "info",
        database_url=os.environ.get("DATABASE_URL", ""),
        redis_url=os.environ.get("REDIS_URL", ""),
        ready_file=ready_file,
        witness=screen,
    ) as running:
        screen.ready(running, seconds=time.monotonic() - started)
        await screen.show(logs.follow(running.folder.logs))


def _stop_on_signals(screen: Screen) -> None:
    """The first signal ends the stack in order. The second leaves at once: the processes notice and stop themselves."""
    task = asyncio.current_task()
    assert task is not None
    is_stopping = False

    def stop() -> None:
        nonlocal is_stopping
        if is_stopping:
            os._exit(_EXIT_IN_A_HURRY)
        is_stopping = True
        screen.stopping()
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop)


async def _worker(modules: list[str], data_dir: Path, *, ready_file: Path | None) -> int:
    from mainspring.worker import run

    target, bearer = os.environ.get("MAINSPRING_DISPATCHER_TARGET", ""), os.environ.get("MAINSPRING_TOKEN", "")
    if not (target and bearer):
        url, bearer = find(data_dir)
        if not target:
            async with Client(url, bearer) as client:
                target = (await client.request("GET", "/v1/endpoints"))["dispatcher"]
    drain_seconds = _read_drain_seconds(os.environ.get("MAINSPRING_DRAIN_SECONDS") or str(_DRAIN_SECONDS))
    return await run(modules, target=target, token=bearer, drain_seconds=drain_seconds, ready_file=ready_file)


def _read_drain_seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no number of seconds.", param_hint="MAINSPRING_DRAIN_SECONDS") from error
