"""The rules of the tests themselves: real things, no doubles, no sleeps, and the shape of the integration files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable

import pytest

from tests.tidy.source import Module, called, imports, is_under, modules, written

pytestmark = pytest.mark.tidy

DOUBLES = ("unittest.mock", "mock", "pytest_mock", "responses", "freezegun")
SKIPS = {"skip", "skipif", "xfail", "importorskip"}
# What a process is started with is its input; our own code is never patched.
MONKEYPATCHES = {"setenv", "delenv", "chdir", "syspath_prepend"}
# The one place that polls, with a deadline, for tests that wait for a condition.
WAITING = "test_framework/waiting.py"
# Its time is virtual: whoever sleeps there waits for nothing real.
SIMULATION = "tests/simulation/"
SEGMENTS = {"Free", "Early", "Mid", "Enterprise", "Platform", "All"}
VALUE_LABELS = ("Segment", "Business Goal", "Value Impact", "Strategic Impact")
BASE = "BaseIntegrationTest"
BASE_FILE = "test_framework/base_integration_test.py"


def doubles(found: Iterable[Module]) -> list[str]:
    """Mocks and patches of our own code."""
    offences = []
    for module in found:
        for node, name in imports(module):
            if is_under(name, DOUBLES):
                offences.append(module.offence(node, f"{name}: use the real thing"))
        for call in module.nodes:
            if isinstance(call, ast.Call) and called(call).startswith("monkeypatch."):
                verb = called(call).rpartition(".")[2]
                if verb not in MONKEYPATCHES:
                    offences.append(module.offence(call, f"monkeypatch.{verb}: use the real thing"))
    return offences


def skips(found: Iterable[Module]) -> list[str]:
    """Tests that may not run."""
    return [
        module.offence(node, f"{name}: what is missing is a failure")
        for module in found
        for node in module.nodes
        if isinstance(node, ast.Attribute | ast.Name)
        and (name := called(node)).startswith("pytest.")
        and name.rpartition(".")[2] in SKIPS
    ]


def sleeps(found: Iterable[Module]) -> list[str]:
    """Waits for a time instead of a condition; sleep(0) gives way and is none."""
    return [
        module.offence(node, "sleeps: wait on a condition with a deadline")
        for module in found
        if module.path != WAITING and not module.path.startswith(SIMULATION)
        for node in module.nodes
        if isinstance(node, ast.Call)
        and called(node) in ("time.sleep", "asyncio.sleep", "sleep")
        and not (node.args and isinstance(node.args[0], ast.Constant) and node.args[0].value == 0)
    ]


def path_tricks(found: Iterable[Module]) -> list[str]:
    """Relative imports, and a changed import path."""
    offences: list[str] = []
    for module in found:
        offences.extend(
            module.offence(node, f"{name}: import by the whole name")
            for node, name in imports(module)
            if name.startswith(".")
        )
        offences.extend(
            module.offence(node, "changes sys.path")
            for node in module.nodes
            if isinstance(node, ast.Attribute) and called(node) == "sys.path"
        )
    return offences


def fixtures_named_like_tests(found: Iterable[Module]) -> list[str]:
    """Fixtures that pytest would collect as tests."""
    return [
        module.offence(node, f"the fixture {node.name} is named like a test")
        for module in found
        for node in module.nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and any(called(decorator).endswith("fixture") for decorator in node.decorator_list)
    ]


def other_bases(found: Iterable[Module]) -> list[str]:
    """Definitions of the base class beside the one of the framework."""
    return [
        module.offence(node, f"{node.name} is defined once, in {BASE_FILE}")
        for module in found
        if module.path != BASE_FILE
        for node in module.nodes
        if isinstance(node, ast.ClassDef) and node.name == BASE
    ]


def unjustified(found: Iterable[Module]) -> list[str]:
    """Integration files whose docstring does not end with the four lines of their business value."""
    offences = []
    for module in found:
        if not re.search(r"tests/integration/test_\w+\.py$", module.path):
            continue
        lines = [line.strip() for line in (ast.get_docstring(module.tree) or "").rstrip().splitlines()]
        last = [line.partition(":") for line in lines[-4:]]
        if [label for label, _, _ in last] != list(VALUE_LABELS) or not all(text.strip() for _, _, text in last):
            offences.append(f"{module.path}: the docstring must end with the lines {', '.join(VALUE_LABELS)}")
        elif not SEGMENTS & set(re.findall(r"\w+", last[0][2])):
            offences.append(f"{module.path}: the segment is one of {', '.join(sorted(SEGMENTS))}")
    return offences


def shapeless_integration_tests(found: Iterable[Module]) -> list[str]:
    """Integration tests outside a class TestAgent…(BaseIntegrationTest), or without their two markers."""
    offences = []
    for module in found:
        if not re.search(r"tests/integration/test_\w+\.py$", module.path):
            continue
        markers = {called(node) for node in module.nodes if isinstance(node, ast.Attribute)}
        for marker in ("pytest.mark.integration", "pytest.mark.real_services"):
            if marker not in markers:
                offences.append(f"{module.path}: lacks {marker}")
        for node in module.tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                offences.append(module.offence(node, f"{node.name}: belongs in a class TestAgent…"))
            if not isinstance(node, ast.ClassDef) or not node.name.startswith("Test"):
                continue
            if not node.name.startswith("TestAgent") or BASE not in {called(base) for base in node.bases}:
                offences.append(module.offence(node, f"{node.name}: name it TestAgent… and inherit {BASE}"))
    return offences


def _tests() -> tuple[Module, ...]:
    return modules("tests", "test_framework")


def test_nothing_is_mocked() -> None:
    assert doubles(_tests()) == []


def test_nothing_is_skipped() -> None:
    assert skips(_tests()) == []


def test_nothing_sleeps() -> None:
    assert sleeps(_tests()) == []


def test_imports_are_whole() -> None:
    assert path_tricks(_tests()) == []


def test_fixtures_are_not_named_like_tests() -> None:
    assert fixtures_named_like_tests(_tests()) == []


def test_there_is_one_base_class() -> None:
    assert other_bases(_tests()) == []


def test_integration_files_say_what_they_are_worth() -> None:
    assert unjustified(_tests()) == []


def test_integration_tests_have_their_shape() -> None:
    assert shapeless_integration_tests(_tests()) == []


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (doubles, "from unittest import mock"),
        (doubles, "def test_a(monkeypatch): monkeypatch.setattr(a, 'b', 1)"),
        (skips, "@pytest.mark.skipif(True)\ndef test_a(): ..."),
        (skips, "def test_a(): pytest.skip('no server')"),
        (sleeps, "async def test_a(): await asyncio.sleep(0.1)"),
        (path_tricks, "sys.path.insert(0, '.')"),
        (path_tricks, "from .base import A"),
        (fixtures_named_like_tests, "@pytest.fixture\ndef test_stack(): ..."),
        (other_bases, "class BaseIntegrationTest: ..."),
        (unjustified, '"""Segment: Free\nBusiness Goal: x\nValue Impact: y"""'),
        (unjustified, '"""A.\n\nSegment: Big\nBusiness Goal: x\nValue Impact: y\nStrategic Impact: z"""'),
        (shapeless_integration_tests, "pytest.mark.integration\npytest.mark.real_services\nclass TestRuns: ..."),
        (shapeless_integration_tests, "pytest.mark.integration\npytest.mark.real_services\ndef test_a(): ..."),
        (shapeless_integration_tests, "pytest.mark.integration"),
    ],
)
def test_a_breach_is_found(rule: object, text: str) -> None:
    assert callable(rule)
    assert len(rule([written("tests/integration/test_agent_x.py", text)])) == 1
