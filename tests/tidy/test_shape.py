"""The shape of the code: sizes, names, tasks, exceptions, output and comments."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable

import pytest

from tests.tidy.source import AROUND, Module, called, everything, modules, product, written

pytestmark = pytest.mark.tidy

FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 400
KIT_LINES_MAX = 1_400
POSITIONAL_MAX = 2

BANNED_WORDS = {"manager", "managers", "helper", "helpers", "util", "utils"}
BANNED_VERBS = ("handle_", "process_")
# Where an exception of any kind may be caught: the interceptors, the server's root, the roots of engines, and where a
# worker imports and calls its users' code.
CATCH_ALL = {
    "gateway/mainspring_gateway/interceptor.py",
    "sdk/mainspring/worker/calls.py",
    "sdk/mainspring/worker/loading.py",
    "services/mainspring_kit/interceptors.py",
    "services/mainspring_kit/server.py",
}
CATCH_ALL_ROOMS = {"engine", "__main__"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(module: Module) -> list[Function]:
    return [node for node in module.nodes if isinstance(node, Function)]


def long_functions(found: Iterable[Module]) -> list[str]:
    """Functions that do not fit a screen."""
    return [
        module.offence(node, f"{node.name} has {lines} lines, at most {FUNCTION_LINES_MAX}")
        for module in found
        for node in _functions(module)
        if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES_MAX
    ]


def long_files(found: Iterable[Module]) -> list[str]:
    """Files that should be a folder with one noun per file."""
    return [
        f"{module.path}: {lines} lines, at most {FILE_LINES_MAX}"
        for module in found
        if (lines := len(module.text.splitlines())) > FILE_LINES_MAX
    ]


def silent_modules(found: Iterable[Module]) -> list[str]:
    """Modules that do not open with what they own."""
    return [
        f"{module.path}: no docstring" for module in found if module.tree.body and not ast.get_docstring(module.tree)
    ]


def prints(found: Iterable[Module]) -> list[str]:
    """Output beside the log."""
    return [
        module.offence(node, "print: log a line instead")
        for module in found
        for node in module.nodes
        if isinstance(node, ast.Call) and called(node) == "print"
    ]


def ownerless_tasks(found: Iterable[Module]) -> list[str]:
    """Tasks that no TaskGroup awaits."""
    banned = re.compile(
        r"^(asyncio|loop|.*\.loop|.*get_running_loop.*)\.(create_task|ensure_future|gather)$|^gather$|ensure_future$"
    )
    return [
        module.offence(node, f"{name}: start it in a TaskGroup")
        for module in found
        for node in module.nodes
        if isinstance(node, ast.Call) and banned.search(name := called(node))
    ]


def broad_catches(found: Iterable[Module]) -> list[str]:
    """`except Exception` outside the few roots, and cancellation swallowed; tidying up and raising again is neither."""
    offences = []
    for module in found:
        may_catch_all = module.path in CATCH_ALL or module.room in CATCH_ALL_ROOMS
        for node in module.nodes:
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = _caught(node)
            reraises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            if "Exception" in caught and not may_catch_all:
                offences.append(module.offence(node, "catches every exception: name what can happen"))
            if caught & {"BaseException", "CancelledError"} and not reraises:
                offences.append(module.offence(node, "swallows cancellation: raise it again"))
    return offences


def _caught(handler: ast.ExceptHandler) -> set[str]:
    if handler.type is None:
        return {"BaseException"}
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {called(kind.value if isinstance(kind, ast.Starred) else kind).rpartition(".")[2] for kind in types}


def banned_names(found: Iterable[Module]) -> list[str]:
    """Names that say nothing."""
    offences = []
    for module in found:
        names: list[tuple[ast.AST, str]] = [(module.tree, stem) for stem in module.path.removesuffix(".py").split("/")]
        for node in module.nodes:
            if isinstance(node, Function | ast.ClassDef):
                names.append((node, node.name))
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.append((node, node.id))
            elif isinstance(node, ast.arg):
                names.append((node, node.arg))
        for node, name in names:
            words = {word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)}
            verb = isinstance(node, Function) and name.lstrip("_").startswith(BANNED_VERBS)
            if words & BANNED_WORDS or verb:
                offences.append(module.offence(node, f"the name {name} says nothing: say what it does"))
    return offences


def silent_ignores(found: Iterable[Module]) -> list[str]:
    """Ignores of a checker that do not say why."""
    ignore = re.compile(r"#\s*(type: ignore|noqa|pragma)(?P<rest>.*)$")
    offences = []
    for module in found:
        for number, line in enumerate(module.text.splitlines(), start=1):
            match = ignore.search(line)
            if match and not re.search(r"#\s*\w+|\]\s*[:—-]\s*\w+", match["rest"]):
                offences.append(f"{module.path}:{number}: an ignore carries its reason: `{match[0]}`")
    return offences


def loose_arguments(found: Iterable[Module]) -> list[str]:
    """Positional arguments after the second, and booleans that a call does not name."""
    offences = []
    for module in found:
        for node in _functions(module):
            if node.name.startswith("__") and node.name != "__init__":
                continue
            positional = [argument for argument in node.args.args if argument.arg not in ("self", "cls")]
            for argument in positional[POSITIONAL_MAX:]:
                offences.append(module.offence(argument, f"{node.name}: {argument.arg} must be keyword-only"))
            for argument in positional[:POSITIONAL_MAX]:
                if isinstance(argument.annotation, ast.Name) and argument.annotation.id == "bool":
                    offences.append(
                        module.offence(argument, f"{node.name}: the boolean {argument.arg} must be keyword-only")
                    )
    return offences


def inheritances(found: Iterable[Module]) -> list[str]:
    """Classes of ours that inherit from classes of ours; errors, protocols and settings may."""
    classes = [(module, node) for module in found for node in module.nodes if isinstance(node, ast.ClassDef)]
    bases = {node.name: {called(base).rpartition(".")[2] for base in node.bases} for _, node in classes}
    may_be_inherited = {name for name in bases if name.endswith(("Error", "Settings")) or "Protocol" in bases[name]}
    return [
        module.offence(node, f"{node.name} inherits from {base}: let it have one instead")
        for module, node in classes
        for base in sorted((bases[node.name] & bases.keys()) - may_be_inherited)
    ]


def open_dataclasses(found: Iterable[Module]) -> list[str]:
    """Dataclasses without slots: they take attributes that nobody declared."""
    return [
        module.offence(decorator, f"{node.name}: write @dataclass(slots=True), frozen where it is a value")
        for module in found
        for node in module.nodes
        if isinstance(node, ast.ClassDef)
        for decorator in node.decorator_list
        if called(decorator).rpartition(".")[2] == "dataclass" and "slots=True" not in ast.unparse(decorator)
    ]


def test_functions_fit_a_screen() -> None:
    assert long_functions(everything()) == []


def test_files_hold_one_noun() -> None:
    assert long_files([*product(), *modules(*AROUND)]) == []


def test_the_kit_stays_small() -> None:
    assert sum(module.lines for module in product() if module.package == "mainspring_kit") < KIT_LINES_MAX


def test_modules_say_what_they_own() -> None:
    assert silent_modules(everything()) == []


def test_services_log_and_never_print() -> None:
    assert prints(modules("services", "gateway")) == []


def test_every_task_has_an_owner() -> None:
    assert ownerless_tasks(product()) == []


def test_only_roots_catch_everything() -> None:
    assert broad_catches(product()) == []


def test_names_say_something() -> None:
    assert banned_names(everything()) == []


def test_ignores_carry_their_reason() -> None:
    assert silent_ignores(everything()) == []


def test_arguments_are_named_in_calls() -> None:
    assert loose_arguments(product()) == []


def test_classes_inherit_from_no_class_of_ours() -> None:
    assert inheritances(product()) == []


def test_dataclasses_have_slots() -> None:
    assert open_dataclasses(product()) == []


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (long_functions, "def f() -> None:\n" + "    pass\n" * FUNCTION_LINES_MAX),
        (long_files, "x = 1\n" * (FILE_LINES_MAX + 1)),
        (silent_modules, "x = 1"),
        (prints, "print(1)"),
        (ownerless_tasks, "asyncio.create_task(f())"),
        (ownerless_tasks, "self.loop.create_task(f())"),
        (ownerless_tasks, "asyncio.gather(a, b)"),
        (broad_catches, "try:\n    f()\nexcept Exception:\n    raise"),
        (broad_catches, "try:\n    f()\nexcept BaseException:\n    pass"),
        (broad_catches, "try:\n    f()\nexcept (ValueError, asyncio.CancelledError):\n    pass"),
        (banned_names, "class RunManager: ..."),
        (banned_names, "def _handle_frame() -> None: ..."),
        (banned_names, "def f(string_utils: str) -> None: ..."),
        (silent_ignores, "x: int = ''  # type: " + "ignore[assignment]"),
        (loose_arguments, "def f(a: int, b: int, c: int) -> None: ..."),
        (loose_arguments, "def f(a: bool) -> None: ..."),
        (inheritances, "class Base: ...\nclass Run(Base): ..."),
        (open_dataclasses, "@dataclass(frozen=True)\nclass Run: ..."),
    ],
)
def test_a_breach_is_found(rule: object, text: str) -> None:
    assert callable(rule)
    assert len(rule([written("services/mainspring_state/store.py", text)])) == 1


def test_a_task_of_a_group_is_no_breach() -> None:
    assert ownerless_tasks([written("services/mainspring_state/engine.py", "group.create_task(f())")]) == []
