"""The pages against the code: tables made from it, links that lead somewhere, and code blocks that are code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Final

import pytest
import yaml
from mainspring.v1 import events_pb2

from tests.tidy.source import ROOT
from tests.tidy.tables import with_tables

pytestmark = pytest.mark.tidy

LINK: Final = re.compile(r"\[[^\]]+\]\((?!https?://|#)([^)#]+)")
BLOCK: Final = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def pages() -> dict[str, str]:
    """Every page by its path."""
    found = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "k8s").rglob("*.md"),
        *(ROOT / "tests").glob("*.md"),
    ]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(found)}


def dead_links(texts: Mapping[str, str]) -> list[str]:
    """Links to files that are not there."""
    return [
        f"{path}: {link}"
        for path, text in texts.items()
        for link in LINK.findall(text)
        if not (ROOT / path).parent.joinpath(link).exists()
    ]


def blocks(texts: Mapping[str, str], language: str) -> Iterator[tuple[str, str]]:
    """The code blocks in a language, with their page."""
    for path, text in texts.items():
        for match in BLOCK.finditer(text):
            if match["language"] == language:
                yield path, match["text"]


def test_tables_are_made_from_the_code() -> None:
    for path, text in pages().items():
        assert text == with_tables(text), f"{path}: run `make docs`"


def test_settings_and_errors_have_a_table() -> None:
    assert "<!-- table: settings -->" in pages()["docs/operations.md"]
    assert "<!-- table: errors -->" in pages()["docs/contracts.md"]


def test_every_event_is_documented() -> None:
    events = {field.name for field in events_pb2.RunEvent.DESCRIPTOR.oneofs_by_name["payload"].fields}
    rows = re.findall(r"^\| `(agent_\w+|tool_\w+|\w+)`", pages()["docs/contracts.md"], re.MULTILINE)
    assert events - set(rows) == set()


def test_links_lead_somewhere() -> None:
    assert dead_links(pages()) == []


def test_python_blocks_are_python() -> None:
    for path, text in blocks(pages(), "python"):
        assert ast.parse(text).body, path


def test_yaml_blocks_are_yaml() -> None:
    for path, text in blocks(pages(), "yaml"):
        assert yaml.safe_load(text), path


def test_commands_name_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for text in pages().values() for name in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)}
    assert named - targets == set()


def test_a_dead_link_is_found() -> None:
    assert dead_links({"docs/a.md": "[x](nowhere.md) [y](../LICENSE) [z](https://a.example)"}) == [
        "docs/a.md: nowhere.md"
    ]


def test_an_outdated_table_is_found() -> None:
    page = "<!-- table: errors -->\n| RUN_LOST |\n<!-- end of table -->"
    assert "RUN_NOT_FOUND" in with_tables(page)
    assert "RUN_LOST" not in with_tables(page)
