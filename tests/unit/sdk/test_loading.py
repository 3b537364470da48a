"""Which tools a worker finds in its modules, and what it says when it cannot."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mainspring.errors import WorkerError
from mainspring.worker import load_tools

pytestmark = pytest.mark.unit

PREFIX = "loading_case_"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory for modules of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith(PREFIX)]:
        del sys.modules[name]


def write(folder: Path, name: str, text: str) -> str:
    (folder / f"{PREFIX}{name}.py").write_text(text)
    return PREFIX + name


TOOLS = """
from mainspring import tool

@tool(effect="pure")
async def find(text: str) -> str:
    return text

@tool(name="bill.read", effect="idempotent")
def read(path: str) -> int:
    return 1

def neither() -> None: ...
"""


def test_marked_functions_are_found_in_the_current_directory(folder: Path) -> None:
    found = load_tools([write(folder, "good", TOOLS)])
    assert sorted(found) == ["bill.read", "find"]
    assert found["bill.read"].effect == "idempotent"


def test_a_tool_that_two_modules_hold_is_one_tool(folder: Path) -> None:
    first = write(folder, "first", TOOLS)
    second = write(folder, "second", f"from {first} import find")
    assert sorted(load_tools([first, second])) == ["bill.read", "find"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", ["has no tool", "@tool"]),
        ("import nothing_of_that_name", ["needs nothing_of_that_name", "not installed"]),
        ("1 / 0", ["cannot be imported", "ZeroDivisionError", ".py:1"]),
        ("raise SystemExit('no')", ["cannot be imported", "SystemExit: no"]),
        ("def broken(:", ["cannot be imported", "SyntaxError"]),
        ("from mainspring import tool\n@tool\ndef f(a): ...", ["cannot be declared", "a has no type hint"]),
        ("from mainspring import tool\n@tool(name='No')\ndef f(): ...", ["cannot be imported", "not a tool's name"]),
        (TOOLS + "\n@tool(name='find')\ndef other() -> None: ...", ["Two tools are called find"]),
    ],
)
def test_a_module_at_fault_is_named_with_what_to_do(folder: Path, text: str, words: list[str]) -> None:
    with pytest.raises(WorkerError) as raised:
        load_tools([write(folder, "bad", text)])
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("name", ["loading_case_nowhere", "loading_case_nowhere.tools", "tools.py"])
def test_a_module_that_is_not_there_is_named(folder: Path, name: str) -> None:
    with pytest.raises(WorkerError, match=f"no module {name}.*dotted name"):
        load_tools([name])


def test_no_modules_are_no_worker() -> None:
    with pytest.raises(WorkerError, match="no tool to serve"):
        load_tools([])
