"""The environments that peers run in, under `build/peers`: what each needs, how it is made, whether it is ready."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SOURCES: Final = Path(__file__).resolve().parent
ENVIRONMENTS: Final = SOURCES.parents[1] / "build" / "peers"
STEP_SECONDS_MAX: Final = 600.0
REQUIREMENTS: Final = "requirements.txt"
PACKAGE: Final = "package.json"

_STAMP: Final = ".made-of"
_PROBE_SECONDS_MAX: Final = 10.0


class UnavailableError(Exception):
    """A peer can't be set up or measured. The message says why; the others go on."""


@dataclass(frozen=True, slots=True)
class Program:
    """A peer: the folder of its program and requirements, its variants (name of the column -> variant), its needs."""

    name: str
    columns: dict[str, str]
    python_least: tuple[int, int] = (3, 11)
    # Which of the platform's servers it uses: their CPU then counts for it.
    uses: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Its environment."""
        return ENVIRONMENTS / self.name

    @property
    def python(self) -> Path:
        """Its own interpreter."""
        return self.folder / "bin" / "python"

    def require(self) -> None:
        """UnavailableError unless its environment is there, made of what the requirements are now."""
        stamp = self.folder / _STAMP
        if not stamp.is_file():
            raise UnavailableError("it is not set up: run `make bench-peers`, which says why if it can't be")
        if stamp.read_text() != self._made_of():
            raise UnavailableError("its requirements have changed: run `make bench-peers`")

    def make(self) -> None:
        """Makes its environment unless it is ready; UnavailableError says what failed."""
        if (self.folder / _STAMP).is_file() and (self.folder / _STAMP).read_text() == self._made_of():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        _step(_interpreter(self.python_least), "-m", "venv", str(self.folder))
        pip = (str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        _step(*pip, "--only-binary", ":all:", "--requirement", str(SOURCES / self.name / REQUIREMENTS))
        if (SOURCES / self.name / PACKAGE).is_file():
            npm = shutil.which("npm")
            if npm is None:
                raise UnavailableError("it needs npm (Node.js), which is not on the PATH")
            shutil.copy(SOURCES / self.name / PACKAGE, self.folder / PACKAGE)
            quiet = ("--loglevel=error", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts")
            _step(npm, "install", *quiet, "--prefix", str(self.folder))
        (self.folder / _STAMP).write_text(self._made_of())

    def _made_of(self) -> str:
        found = hashlib.sha256()
        for name in (REQUIREMENTS, PACKAGE):
            path = SOURCES / self.name / name
            found.update(path.read_bytes() if path.is_file() else b"")
        return found.hexdigest()


# Measured in one group, in turns: they use few per cent of a core while they wait.
PROGRAMS: Final = (
    Program("dbos", {"dbos": "stream", "dbos_steps": "steps"}, uses=("postgres",)),
    Program("langgraph", {"langgraph": "graph"}, uses=("postgres",)),
    Program("restate", {"restate": "steps"}),
)
# Slow, so that a slice with many callers takes long to begin and to end, or busy while idle: each by itself.
SLOW_PROGRAMS: Final = (
    Program("aegra", {"aegra": "graph"}, python_least=(3, 12), uses=("postgres", "redis")),
    Program("temporal", {"temporal": "activities"}),
)


def make_all(programs: Sequence[Program]) -> Iterator[str]:
    """Makes the environments one after the other and says of each how it went."""
    for program in programs:
        try:
            program.make()
        except UnavailableError as error:
            yield f"{program.name}: left out, {error}"
        else:
            yield f"{program.name}: ready in {program.folder.relative_to(ENVIRONMENTS.parents[1])}"


def _interpreter(least: tuple[int, int]) -> str:
    """A Python of at least this version: the one that runs this, or one that is found."""
    if sys.version_info[:2] >= least:
        return sys.executable
    wanted = [f"python3.{minor}" for minor in range(least[1], least[1] + 3)]
    versions = sorted(Path("~/.pyenv/versions").expanduser().glob("*/bin/python"))
    for name in [*filter(None, map(shutil.which, wanted)), *map(str, versions)]:
        check = f"import sys, venv; sys.exit(sys.version_info[:2] < {least})"
        if subprocess.run([name, "-c", check], capture_output=True, timeout=_PROBE_SECONDS_MAX).returncode == 0:
            return name
    raise UnavailableError(f"it needs Python {least[0]}.{least[1]} or later, and there is none here")


def _step(*argv: str) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=STEP_SECONDS_MAX, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{Path(argv[0]).name} took longer than {STEP_SECONDS_MAX:g} s") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise UnavailableError(f"{Path(argv[0]).name} failed: {said[-1] if said else f'exit code {done.returncode}'}")
