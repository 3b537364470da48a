"""The repository as the tidy tests see it: its Python modules, parsed once, and its text files."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE_ROOTS = ("sdk", "services", "gateway")
PRODUCT = ("sdk/mainspring", "services", "gateway")
AROUND = ("benchmarks", "examples", "test_framework")
GENERATED = ("sdk/mainspring/v1/", "sdk/buf/")
SERVICES = ("registry", "dispatcher", "execution", "state", "gateway")


@dataclass(frozen=True, slots=True)
class Module:
    """One Python file: its path from the root with slashes, its text, its syntax tree and all nodes of that."""

    path: str
    text: str
    tree: ast.Module
    nodes: tuple[ast.AST, ...]

    @property
    def package(self) -> str:
        """The top-level package, as `mainspring_state`; for what is outside the source roots its first folder."""
        parts = self.path.split("/")
        return parts[1] if parts[0] in SOURCE_ROOTS else parts[0]

    @property
    def room(self) -> str:
        """The room within the package: `store` for `store.py` and for `store/events.py`."""
        parts = self.path.split("/")
        return parts[2].removesuffix(".py") if len(parts) > 2 else ""

    @property
    def lines(self) -> int:
        """The lines that say something: all but blank ones."""
        return sum(1 for line in self.text.splitlines() if line.strip())

    def offence(self, node: ast.AST, what: str) -> str:
        """A line that an editor can jump to."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {what}"


def written(path: str, text: str) -> Module:
    """A module of this text; in tests one that exists nowhere else, shown to a rule to prove that it bites."""
    tree = ast.parse(text)
    return Module(path, text, tree, tuple(ast.walk(tree)))


@cache
def _read(path: str) -> Module:
    return written(path, (ROOT / path).read_text())


@cache
def modules(*folders: str) -> tuple[Module, ...]:
    """The modules under the folders, generated ones left out, in order of their paths."""
    found = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT).as_posix()
            if not relative.startswith(GENERATED):
                found.append(_read(relative))
    return tuple(found)


def product() -> tuple[Module, ...]:
    """What is installed: SDK, services and gateway."""
    return modules(*PRODUCT)


def everything() -> tuple[Module, ...]:
    """All Python of the repository but generated code."""
    return modules(*PRODUCT, *AROUND, "tests")


@cache
def text_files() -> dict[str, str]:
    """The repository's own text by path: no generated, vendored or locked files, nothing that git ignores."""
    folders = (".ci", "protos/mainspring", "services", "gateway", "sdk/mainspring", "console", "k8s", "docs", *AROUND)
    paths = [path for path in ROOT.iterdir() if path.is_file() and path.name != "requirements.lock"]
    for folder in (*folders, "tests"):
        paths.extend(path for path in (ROOT / folder).rglob("*") if path.is_file())
    texts = {}
    for path in paths:
        relative = path.relative_to(ROOT).as_posix()
        if "__pycache__" in relative or relative.startswith(GENERATED):
            continue
        try:
            texts[relative] = path.read_text()
        except UnicodeDecodeError:
            continue
    return texts


def imports(module: Module) -> Iterator[tuple[ast.stmt, str]]:
    """Each name imported, dotted in full; a relative import keeps its dots in front."""
    for node in module.nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node, f"{'.' * node.level}{node.module or ''}.{alias.name}"


def called(node: ast.AST) -> str:
    """The dotted name of what a call calls, `a.b.c`; empty when it is no plain name."""
    parts: list[str] = []
    target = node.func if isinstance(node, ast.Call) else node
    while isinstance(target, ast.Attribute):
        parts.append(target.attr)
        target = target.value
    if not isinstance(target, ast.Name):
        return ""
    return ".".join([target.id, *reversed(parts)])


def is_under(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a dotted name is one of the prefixes or inside one."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
