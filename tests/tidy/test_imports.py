"""The import law: who may know whom, so that services meet only in the contracts."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import pytest

from tests.tidy.source import Module, everything, imports, is_under, product, written

pytestmark = pytest.mark.tidy

# The kit names no domain noun: of the contracts it knows errors and identity only.
KIT_CONTRACTS = ("mainspring.v1.errors_pb2", "mainspring.v1.identity_pb2")
# What a room may import of its own package; `__main__` wires and may import all.
ROOMS = {
    "config": (),
    "servicer": ("core", "store", "peers", "engine"),
    "app": ("core", "store", "peers", "engine", "config"),
    "core": (),
    "store": ("core", "sql"),
    "peers": ("core",),
    "engine": ("core", "store", "peers", "config"),
}
CORE_FORBIDDEN = (
    "asyncio",
    "grpc",
    "asyncpg",
    "redis",
    "time",
    "random",
    "os",
    "secrets",
    "uuid",
    "socket",
    "threading",
)
# Libraries that compute and do nothing else.
CORE_LIBRARIES = (
    *("google", "mainspring.v1", "mainspring_kit.errors"),
    *("cronsim", "jsonschema", "orjson", "pydantic_core", "standardwebhooks", "yaml"),
)


def _allowed(package: str) -> tuple[str, ...]:
    if package == "mainspring":
        return ("mainspring",)
    if package == "mainspring_kit":
        return ("mainspring_kit", *KIT_CONTRACTS)
    return ("mainspring.v1", "mainspring_kit", package)


def lawless_imports(modules: Iterable[Module]) -> list[str]:
    """Imports of ours that a package may not make, and relative ones, which hide what they reach."""
    offences = []
    for module in modules:
        for node, name in imports(module):
            if name.startswith("."):
                offences.append(module.offence(node, f"relative import {name}: write the whole name"))
            elif is_ours(name) and not is_under(name, _allowed(module.package)):
                offences.append(module.offence(node, f"{module.package} may not import {name}"))
    return offences


def lawless_rooms(modules: Iterable[Module]) -> list[str]:
    """Imports of a room that the room may not make within its own service."""
    offences = []
    for module in modules:
        if not module.package.startswith("mainspring_") or module.package == "mainspring_kit":
            continue
        for node, name in imports(module):
            parts = name.split(".")
            if parts[0] != module.package or len(parts) < 2 or module.room not in ROOMS:
                continue
            if parts[1] not in (module.room, *ROOMS[module.room]) and parts[1] in {*ROOMS, "sql"}:
                offences.append(module.offence(node, f"room {module.room} may not import room {parts[1]}"))
    return offences


def impure_cores(modules: Iterable[Module]) -> list[str]:
    """Imports of a core that could bring in a clock, randomness or I/O."""
    offences = []
    for module in modules:
        if module.room != "core":
            continue
        for node, name in imports(module):
            if is_under(name, CORE_FORBIDDEN) or name.endswith("_pb2_grpc"):
                offences.append(module.offence(node, f"core may not import {name}"))
            elif name.split(".")[0] in sys.stdlib_module_names or is_under(name, (module.package, *CORE_LIBRARIES)):
                continue
            else:
                offences.append(
                    module.offence(node, f"core may import messages, errors and the standard library: {name}")
                )
    return offences


def odd_aliases(modules: Iterable[Module]) -> list[str]:
    """Generated modules under names that differ from file to file."""
    offences = []
    for module in modules:
        for node, name in imports(module):
            stem = name.rpartition(".")[2]
            if not name.startswith("mainspring.v1.") or not stem.endswith(("_pb2", "_pb2_grpc")):
                continue
            alias = next((a.asname for a in node.names if a.name in (stem, name)), None)  # type: ignore[attr-defined]  # an import
            good = (
                {None, "rpc", stem.replace("_pb2_grpc", "_rpc")} if stem.endswith("_grpc") else {None, "pb", stem[:-1]}
            )
            if alias not in good or not name.startswith("mainspring.v1.") or type(node).__name__ == "Import":
                offences.append(
                    module.offence(node, f"write `from mainspring.v1 import {stem} as pb` (or rpc): {alias}")
                )
    return offences


def is_ours(name: str) -> bool:
    """Whether a dotted name belongs to this distribution."""
    return name.split(".")[0] == "mainspring" or name.startswith("mainspring_")


def test_imports_follow_the_law() -> None:
    assert lawless_imports(product()) == []


def test_rooms_import_only_what_they_may() -> None:
    assert lawless_rooms(product()) == []


def test_cores_are_pure() -> None:
    assert impure_cores(product()) == []


def test_generated_modules_have_one_alias() -> None:
    assert odd_aliases(everything()) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("services/mainspring_state/store.py", "import mainspring_registry.store"),
        ("services/mainspring_state/store.py", "from mainspring.client import Client"),
        ("services/mainspring_kit/server.py", "from mainspring.v1 import state_pb2"),
        ("gateway/mainspring_gateway/app.py", "from mainspring_state import core"),
        ("sdk/mainspring/dev.py", "import mainspring_kit.errors"),
        ("services/mainspring_state/store.py", "from . import core"),
    ],
)
def test_a_lawless_import_is_found(path: str, line: str) -> None:
    assert len(lawless_imports([written(path, line)])) == 1


def test_a_core_with_a_clock_is_found() -> None:
    assert (
        len(impure_cores([written("services/mainspring_state/core.py", "import time\nfrom asyncpg import Pool")])) == 2
    )


def test_a_room_that_reaches_too_far_is_found() -> None:
    assert len(lawless_rooms([written("services/mainspring_state/core.py", "from mainspring_state import store")])) == 1


def test_an_odd_alias_is_found() -> None:
    assert len(odd_aliases([written("tests/unit/a.py", "from mainspring.v1 import state_pb2 as s")])) == 1
    assert len(odd_aliases([written("tests/unit/a.py", "import mainspring.v1.state_pb2")])) == 1
