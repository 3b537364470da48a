"""`mainspring dev` and the commands beside it: start, trouble, stop, and what each says when it can't."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from test_framework.waiting import wait_until_blocking
from tests.flow.dev_command import MAINSPRING, DevCommand, environment, json_lines, mainspring, running_dev
from tests.flow.supervising import lives

LOOKUP = Path(__file__).parents[2] / "examples" / "lookup" / "agent.yaml"
SLEEPER = """
apiVersion: mainspring/v1
kind: Agent
name: sleeper
model:
  provider: scripted
  script:
    - calls: [{tool: diagnostics.sleep, arguments: {seconds: 60}}]
    - result: {}
tools: [diagnostics.sleep]
"""
FAILING = """
apiVersion: mainspring/v1
kind: Agent
name: failing
model: {provider: scripted, script: [{fail: {code: INTERNAL, message: The model is broken.}}]}
"""
SHOP = """
from mainspring import tool

@tool(name="shop.stock", effect="pure")
def stock(article: str) -> dict[str, int]:
    return {"pieces": {"tea": 12}[article]}
"""
CLERK = """
apiVersion: mainspring/v1
kind: Agent
name: clerk
model:
  provider: scripted
  script:
    - calls: [{tool: shop.stock, arguments: {article: "{{input.article}}"}}]
    - result: "{{calls[0].result}}"
tools: [shop.stock]
"""
STOP_ORDER = ("worker", "gateway", "execution", "dispatcher", "registry", "state")

ASKING = """
apiVersion: mainspring/v1
kind: Agent
name: asking
model:
  provider: scripted
  script:
    - {text: May I?, calls: [{tool: human.approve, arguments: {title: Spend it?}}]}
    - {text: I wait., calls: [{tool: run.wait_for_signal, arguments: {name: go}}]}
    - {text: Done., result: "{{calls[1].result.data}}"}
tools: [human.approve, run.wait_for_signal]
"""

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCommand]:
    """One for all tests that leave it as it was."""
    with running_dev(tmp_path_factory.mktemp("dev"), "--port", "0") as command:
        applied = command.run("apply", "-f", str(LOOKUP))
        assert applied.returncode == 0, applied.stderr
        yield command


def test_the_ready_file_says_where_everything_is(dev: DevCommand) -> None:
    ready = dev.ready()
    assert list(ready) == [
        "gateway",
        "token",
        "services",
        "database_url",
        "service_database_urls",
        "redis_url",
        "pids",
    ]
    assert list(ready["services"]) == ["registry", "dispatcher", "execution", "state"]
    assert set(ready["pids"]) == {*ready["services"], "gateway", "worker", "postgres", "redis"}
    assert all(lives(pid) for pid in dev.pids())
    assert stat.S_IMODE(dev.ready_file.stat().st_mode) == 0o600
    request = urllib.request.Request(
        f"{ready['gateway']}/v1/tools", headers={"Authorization": f"Bearer {ready['token']}"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        tools = json.load(answer)["tools"]
    assert {tool["name"] for tool in tools if tool["shared"]} >= {"diagnostics.echo", "diagnostics.sleep"}


def test_the_output_is_calm_and_tells_what_one_needs(dev: DevCommand) -> None:
    ready = dev.ready()
    wait_until_blocking(lambda: "Ctrl-C stops everything" in dev.output, what="the last line of the start")
    start = dev.output.partition("Ctrl-C")[0]
    for step in ("Valkey", "PostgreSQL", "migrations", "registry, dispatcher, execution, state, gateway, worker"):
        assert re.search(rf"^  {re.escape(step)}\b.* \d+\.\d\d s$", start, re.MULTILINE), start
    assert f"{ready['gateway']}/" in start
    assert ready["token"] in start
    assert "development key" in start
    assert "\x1b" not in start
    assert len(start.splitlines()) < 20


def test_a_second_one_on_the_same_folder_is_told_where_the_first_is(dev: DevCommand) -> None:
    second = dev.run("dev", "--port", "0")
    assert second.returncode == 1
    assert f"in use by process {dev.process.pid}, whose gateway is at {dev.ready()['gateway']}" in second.stderr
    assert "Traceback" not in second.stderr


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        refused = mainspring("dev", "--data-dir", str(tmp_path / "d"), "--port", str(port), cwd=tmp_path)
    assert refused.returncode == 1
    assert f"Port {port} on 127.0.0.1 is taken" in refused.stderr
    assert "--port N" in refused.stderr


def test_data_of_another_postgres_is_named(tmp_path: Path) -> None:
    (tmp_path / "d" / "postgres").mkdir(parents=True)
    (tmp_path / "d" / "postgres" / "PG_VERSION").write_text("16\n")
    refused = mainspring("dev", "--data-dir", str(tmp_path / "d"), "--port", "0", cwd=tmp_path)
    assert refused.returncode == 1
    assert "holds data of PostgreSQL 16; Mainspring brings PostgreSQL 18" in refused.stderr


def test_a_worker_without_its_module_ends_the_start_with_the_reason(tmp_path: Path) -> None:
    refused = mainspring("dev", "no_such_tools", "--data-dir", str(tmp_path / "d"), "--port", "0", cwd=tmp_path)
    assert refused.returncode == 1
    assert "worker ended with exit code 1 before it served" in refused.stderr
    assert "no_such_tools" in refused.stderr
    assert not (tmp_path / "d" / "ready.json").exists()


@pytest.mark.parametrize("name", ["state", "gateway", "worker", "redis"])
def test_a_killed_child_is_back_within_a_second_and_the_ready_file_says_so(dev: DevCommand, name: str) -> None:
    [before] = dev.ready()["pids"][name]
    killed = time.monotonic()
    os.kill(before, signal.SIGKILL)

    def is_back() -> bool:
        return dev.ready()["pids"].get(name, [before]) not in ([before], [])

    wait_until_blocking(is_back, 10, what="a new pid in the ready file")
    assert time.monotonic() - killed < 1
    wait_until_blocking(lambda: re.search(rf"{name} .*serves again", dev.output), 30, what="the word that it serves")
    assert re.search(rf"{name} .*died \(SIGKILL\); starting it again", dev.output)


def test_run_prints_the_events_and_then_the_answer(dev: DevCommand) -> None:
    done = dev.run("run", "lookup", "--input", '{"value": 42}')
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    types = [line.split()[2] for line in lines if re.match(r" +\d+\.\d{3} s ", line)]
    assert types == [
        "agent_started",
        "agent_thinking",
        "tool_executing",
        "tool_completed",
        "agent_thinking",
        "agent_completed",
    ]
    assert json.loads("".join(lines[-3:])) == {"answer": 42}


def test_run_as_json_is_the_log_line_by_line(dev: DevCommand) -> None:
    done = dev.run("run", "lookup", "--input", '{"value": 42}', "--session", "s-json", "--json")
    frames = json_lines(done.stdout)
    assert [frame["seq"] for frame in frames] == [1, 2, 3, 4, 5, 6]
    assert frames[-1]["data"]["result"] == {"answer": 42}
    assert frames[0]["session_id"] == "s-json"
    run_id = frames[0]["run_id"]
    assert json_lines(dev.run("runs", "events", run_id, "--json").stdout) == frames
    assert json_lines(dev.run("runs", "events", run_id, "--json", "--follow", "--after-seq", "4").stdout) == frames[4:]
    assert json.loads(dev.run("runs", "get", run_id, "--json").stdout)["state"] == "COMPLETED"
    listed = json.loads(dev.run("runs", "list", "--session", "s-json", "--json").stdout)
    assert [run["run_id"] for run in listed["runs"]] == [run_id]
    assert run_id in dev.run("runs", "list").stdout


def test_a_run_that_fails_ends_the_command_with_1(dev: DevCommand, tmp_path: Path) -> None:
    (tmp_path / "agents.yaml").write_text(f"{SLEEPER}---{FAILING}")
    applied = dev.run("apply", "-f", str(tmp_path))
    assert applied.stdout == "agent sleeper version 1 is new\nagent failing version 1 is new\n"
    assert dev.run("apply", "-f", str(tmp_path)).stdout.count("is as it was") == 2
    done = dev.run("run", "failing")
    assert done.returncode == 1
    assert "agent_failed" in done.stdout
    assert "The model is broken." in done.stdout


def test_a_run_can_be_cancelled_and_followed_to_its_end(dev: DevCommand, tmp_path: Path) -> None:
    (tmp_path / "agent.yaml").write_text(SLEEPER)
    dev.run("apply", "-f", str(tmp_path / "agent.yaml"))
    started = json.loads(dev.run("run", "sleeper", "--no-follow", "--json").stdout)
    assert started["state"] == "RUNNING"
    assert dev.run("runs", "cancel", started["run_id"], "--reason", "enough").returncode == 0
    followed = dev.run("runs", "events", started["run_id"], "--follow")
    assert followed.returncode == 0
    assert re.search(r"agent_cancelled +by developer: enough", followed.stdout)
    again = dev.run("runs", "cancel", started["run_id"])
    assert again.returncode == 1
    assert "FAILED_PRECONDITION / RUN_ENDED" in again.stderr


def test_a_run_is_answered_paused_signalled_and_explained(dev: DevCommand, tmp_path: Path) -> None:
    (tmp_path / "agent.yaml").write_text(ASKING)
    dev.run("apply", "-f", str(tmp_path / "agent.yaml"))
    run_id = json.loads(dev.run("run", "asking", "--no-follow", "--json").stdout)["run_id"]
    wait_until_blocking(lambda: "approval: " in dev.run("runs", "explain", run_id).stdout, what="the question")
    (approval,) = json.loads(dev.run("approvals", "list", "--run", run_id, "--json").stdout)["approvals"]
    assert dev.run("approvals", "allow", approval["approval_id"], "--data", '{"sum": 7}').returncode == 0
    assert dev.run("approvals", "deny", approval["approval_id"]).returncode == 1
    assert dev.run("runs", "pause", run_id, "--reason", "tea").returncode == 0
    assert json.loads(dev.run("runs", "get", run_id).stdout)["holds"][0]["kind"] in ("paused", "signal")
    assert dev.run("runs", "resume", run_id, "--json").stdout == f'{{"run_id": "{run_id}"}}\n'
    assert dev.run("runs", "signal", run_id, "go", "--data", '{"parcel": 7}').returncode == 0
    told = dev.run("runs", "events", run_id, "--follow").stdout
    for line in ('approval_resolved +allow by developer: {"sum": 7}', 'signal_received +go {"parcel": 7} by developer'):
        assert re.search(line, told), told
    assert json.loads(dev.run("runs", "get", run_id).stdout)["result"] == {"parcel": 7}


def test_what_exists_is_listed(dev: DevCommand) -> None:
    agents = {agent["name"] for agent in json.loads(dev.run("agents", "list", "--json").stdout)}
    assert "lookup" in agents
    assert json.loads(dev.run("agents", "get", "lookup", "--json").stdout)["spec"]["model"]["provider"] == "scripted"
    assert "name: lookup" in dev.run("agents", "get", "lookup").stdout
    assert "diagnostics.echo" in dev.run("tools", "list").stdout


def test_the_schema_can_be_migrated_again_by_hand(dev: DevCommand) -> None:
    done = mainspring("migrate", cwd=dev.folder, MAINSPRING_OWNER_DATABASE_URL=dev.ready()["database_url"])
    assert (done.returncode, done.stdout) == (0, "state: migrated\nregistry: migrated\n")
    broken = mainspring("migrate", cwd=dev.folder, MAINSPRING_OWNER_DATABASE_URL="postgresql://nobody@127.0.0.1:9/x")
    assert broken.returncode == 1
    assert "migration of state failed" in broken.stderr


def test_a_database_that_is_away_ends_the_start_without_a_traceback(tmp_path: Path) -> None:
    done = mainspring("dev", "--port", "0", cwd=tmp_path, DATABASE_URL="postgresql://postgres@127.0.0.1:9/x")
    assert done.returncode == 1
    assert "PostgreSQL cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_by_hand_finds_the_dispatcher_and_its_modules_here(dev: DevCommand, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "clerk.yaml").write_text(CLERK)
    command = [*MAINSPRING, "worker", "shop", "--data-dir", str(dev.data_dir)]
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=log, stderr=log)
    try:
        wait_until_blocking(lambda: "shop.stock" in dev.run("tools", "list").stdout, what="the tool of the worker")
        dev.run("apply", "-f", str(tmp_path / "clerk.yaml"))
        done = dev.run("run", "clerk", "--input", '{"article": "tea"}')
        assert done.returncode == 0, done.stdout
        assert '"pieces": 12' in done.stdout
    finally:
        worker.terminate()
        exit_code = worker.wait(20)
    assert exit_code == 0
    assert "Traceback" not in (tmp_path / "worker.log").read_text()


def test_a_token_is_signed_with_the_secret_of_the_folder(dev: DevCommand) -> None:
    token = dev.run("token", "--tenant", "other", "--user", "ann", "--role", "viewer").stdout.strip()
    url = dev.ready()["gateway"]
    listed = mainspring("runs", "list", cwd=dev.folder, MAINSPRING_URL=url, MAINSPRING_TOKEN=token)
    assert listed.stdout == "No runs.\n"
    refused = mainspring("run", "lookup", cwd=dev.folder, MAINSPRING_URL=url, MAINSPRING_TOKEN=token)
    assert refused.returncode == 1
    assert "PERMISSION_DENIED / ROLE_REQUIRED" in refused.stderr


@pytest.mark.parametrize(
    ("command", "exit_code", "told"),
    [
        (["runs", "get", "nothing"], 1, "NOT_FOUND / RUN_NOT_FOUND"),
        (["run", "nobody"], 1, "NOT_FOUND / AGENT_NOT_FOUND"),
        (["agents", "get", "nobody"], 1, "NOT_FOUND / AGENT_NOT_FOUND"),
        (["apply", "-f", "no-such-file.yaml"], 1, "no-such-file.yaml can't be read"),
        (["run", "lookup", "--input", "{"], 2, "it is not JSON"),
        (["run", "lookup", "--input", "[1]"], 2, "not an object"),
        (["token", "--role", "king"], 2, "no such role"),
        (["dev", "--replicas", "state"], 2, "state=2,gateway=3"),
        (["dev", "--log-level", "loud"], 2, "is none of debug"),
    ],
)
def test_what_goes_wrong_is_told_without_a_traceback(
    dev: DevCommand, command: list[str], exit_code: int, told: str
) -> None:
    done = dev.run(*command)
    assert (done.returncode, done.stdout) == (exit_code, "")
    assert told in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


def test_a_refused_specification_is_told_fault_by_fault(dev: DevCommand, tmp_path: Path) -> None:
    (tmp_path / "agent.yaml").write_text(SLEEPER.replace("provider: scripted", "provider: psychic"))
    refused = dev.run("apply", "-f", str(tmp_path / "agent.yaml"))
    assert refused.returncode == 1
    assert "SPEC_INVALID" in refused.stderr
    assert "model.provider" in refused.stderr


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (SLEEPER.replace("kind: Agent", "kind: Agent\nkind: Agent"), "'kind' twice"),
        (SLEEPER.replace("name: sleeper", "name: sleeper\ndescription: {"), "is neither YAML nor JSON"),
        ("- a list\n", "SPEC_INVALID"),
    ],
)
def test_the_registry_reads_a_document_as_it_is_written(dev: DevCommand, tmp_path: Path, wrong: str, told: str) -> None:
    (tmp_path / "agents.yaml").write_text(f"# two of them\n---\n{SLEEPER}\n---\n{wrong}")
    refused = dev.run("apply", "-f", str(tmp_path / "agents.yaml"))
    assert refused.returncode == 1
    assert "agents.yaml#2 was refused; those before it were applied." in refused.stderr
    assert told in refused.stderr
    lines = [int(number) for number in re.findall(r"line (\d+)", refused.stderr)]
    assert all(number > SLEEPER.count("\n") + 3 for number in lines)
    tabbed = '{"apiVersion": "mainspring/v1",\n\t"kind": "Agent", "name": "tabbed", "description": "no",\n'
    (tmp_path / "agent.json").write_text(tabbed + '\t"model": {"provider": "scripted", "script": [{"result": 1}]}}\n')
    assert "tabbed version 1" in dev.run("apply", "-f", str(tmp_path / "agent.json")).stdout
    (tmp_path / "yes.yaml").write_text(
        SLEEPER.replace("name: sleeper", "name: willing\nlabels: {awake: yes}").replace("\n\n", "\n")
    )
    assert dev.run("apply", "-f", str(tmp_path / "yes.yaml")).returncode == 0
    shown = json.loads(dev.run("agents", "get", "willing", "--json").stdout)
    assert shown["labels"] == {"awake": "yes"}


def test_without_a_platform_a_command_says_how_to_start_one(tmp_path: Path) -> None:
    lost = mainspring("runs", "list", cwd=tmp_path)
    assert lost.returncode == 1
    assert "MAINSPRING_URL and MAINSPRING_TOKEN not set" in lost.stderr
    assert "mainspring dev" in lost.stderr
    gone = mainspring("runs", "list", cwd=tmp_path, MAINSPRING_URL="http://127.0.0.1:9", MAINSPRING_TOKEN="x")
    assert gone.returncode == 1
    assert "http://127.0.0.1:9 can't be reached" in gone.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything_in_order_and_the_data_stays(tmp_path: Path, number: signal.Signals) -> None:
    with running_dev(tmp_path, "--port", "0") as dev:
        pids = dev.pids()
        assert dev.stop(number) == 0
        assert not any(map(lives, pids))
        assert not dev.ready_file.exists()
        assert "Traceback" not in dev.output
    times = [_stop_time(dev.data_dir / "logs" / f"{name}.log") for name in STOP_ORDER]
    assert times == sorted(times)
    assert "database system is shut down" in (dev.data_dir / "logs" / "postgres.log").read_text()


def test_a_killed_dev_leaves_nothing_running_and_the_next_one_has_all_data(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    with running_dev(tmp_path, "--port", port) as dev:
        dev.run("apply", "-f", str(LOOKUP))
        before = dev.run("run", "lookup", "--input", '{"value": 1}', "--json").stdout
        run_id = json_lines(before)[0]["run_id"]
        pids = dev.pids()
        dev.process.kill()
        dev.process.wait()
        wait_until_blocking(lambda: not any(map(lives, pids)), 5, what="an end of all children within 5 s")
    with running_dev(tmp_path, "--port", port) as dev:
        assert dev.run("runs", "events", run_id, "--json").stdout == before
        pids = dev.pids()
        dev.process.kill()
        dev.process.wait()
    # At once, while the children of the killed one may still be stopping.
    with running_dev(tmp_path, "--port", port) as dev:
        assert dev.run("runs", "events", run_id, "--json").stdout == before


def _stop_time(log: Path) -> datetime:
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return datetime.fromisoformat(lines[-1]["timestamp"])
