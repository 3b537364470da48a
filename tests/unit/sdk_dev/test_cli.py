"""The command line without a platform: help with examples, and documents from files that are none."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mainspring.cli import app
from typer.testing import CliRunner

COMMANDS = (
    "dev",
    "worker",
    "apply",
    "run",
    "migrate",
    "token",
    "runs list",
    "runs get",
    "runs events",
    "runs cancel",
    "runs pause",
    "runs resume",
    "runs signal",
    "runs retry",
    "runs fork",
    "runs explain",
    "approvals list",
    "approvals allow",
    "approvals deny",
    "agents list",
    "agents get",
    "tools list",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    told = CliRunner().invoke(app, [*command.split(), "--help"])
    assert told.exit_code == 0
    text = " ".join(told.output.split())
    assert re.search(r"Examples?: ", text)
    assert f"mainspring {command}" in text.partition("Example")[2]


def test_the_version_is_told() -> None:
    told = CliRunner().invoke(app, ["--version"])
    assert told.exit_code == 0
    assert re.fullmatch(r"mainspring \d+\.\d+\S*\n", told.output)


def test_the_whole_has_help_with_exit_codes_and_where_it_looks() -> None:
    text = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    assert "MAINSPRING_URL and MAINSPRING_TOKEN" in text
    assert "Exit codes: 0" in text


@pytest.mark.parametrize("text", ["", "\n---\n# nothing yet\n---\n"])
def test_a_file_without_a_document_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "agent.yaml").write_text(text)
    done = CliRunner().invoke(app, ["apply", "-f", str(tmp_path / "agent.yaml")])
    assert done.exit_code == 1
    assert "holds no document" in str(done.exception)
    assert "agent.yaml" in str(done.exception)


def test_migrate_says_which_setting_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAINSPRING_OWNER_DATABASE_URL", raising=False)
    done = CliRunner().invoke(app, ["migrate"])
    assert "MAINSPRING_OWNER_DATABASE_URL is not set" in str(done.exception)


def test_a_drain_time_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAINSPRING_DISPATCHER_TARGET", "127.0.0.1:1")
    monkeypatch.setenv("MAINSPRING_TOKEN", "x")
    monkeypatch.setenv("MAINSPRING_DRAIN_SECONDS", "long")
    done = CliRunner().invoke(app, ["worker", "mainspring.diagnostics"])
    assert done.exit_code == 2
    assert "MAINSPRING_DRAIN_SECONDS" in done.output


@pytest.mark.parametrize("flags", [["--json"], []])
def test_an_error_is_json_where_json_was_asked_for(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    monkeypatch.setenv("MAINSPRING_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("MAINSPRING_TOKEN", "x")
    command = [sys.executable, "-m", "mainspring", "runs", "list", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    if flags:
        (error,) = [json.loads(line)["error"] for line in done.stdout.splitlines()]
        assert (error["code"], error["reason"]) == ("UNAVAILABLE", "GATEWAY_UNREACHABLE")
        assert "mainspring dev" in error["message"] and error["metadata"] == {"url": "http://127.0.0.1:1"}
    else:
        assert done.stdout == "" and done.stderr.startswith("error: UNAVAILABLE / GATEWAY_UNREACHABLE: ")
