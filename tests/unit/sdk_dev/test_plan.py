"""What a local stack consists of: addresses, roles, and who gets which secret."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jwt
import pytest
from mainspring.dev.folder import Folder, Secrets
from mainspring.dev.plan import (
    GRPC_EXPERIMENTS,
    PROCESSES,
    Plan,
    choose_addresses,
    migration_env,
    parse_replicas,
    role_url,
    service_launches,
    worker_launches,
)
from mainspring.embedded.launch import Launch, StartError

SECRETS = Secrets("dev-" + "a" * 40, "dev-" + "b" * 40)


def make_plan(**replicas: int) -> Plan:
    return Plan(
        secrets=SECRETS,
        database_url="postgresql://postgres@/mainspring?host=/tmp/x",
        redis_url="unix:///tmp/x/valkey.sock?db=0",
        addresses=choose_addresses(0, replicas),
        workers=("shop",),
        worker_replicas=replicas.get("worker", 1),
        extra_env={"EXTRA": "1"},
    )


def launches(tmp_path: Path, **replicas: int) -> dict[str, Launch]:
    return {launch.label: launch for launch in service_launches(make_plan(**replicas), Folder(tmp_path))}


def test_each_replica_has_an_address_of_its_own() -> None:
    addresses = choose_addresses(0, {"state": 2, "gateway": 3})
    flat = [address for found in addresses.values() for address in found]
    assert {name: len(found) for name, found in addresses.items()} == {
        "registry": 1,
        "dispatcher": 1,
        "execution": 1,
        "state": 2,
        "gateway": 3,
    }
    assert len(set(flat)) == len(flat)


def test_the_first_gateway_has_the_port_that_was_asked_for() -> None:
    assert choose_addresses(8123, {"gateway": 2})["gateway"][0] == "127.0.0.1:8123"


@pytest.mark.parametrize("replicas", [{"nobody": 1}, {"state": 0}, {"state": 17}])
def test_replicas_of_nothing_are_refused(replicas: dict[str, int]) -> None:
    with pytest.raises(StartError, match="Replicas are given as"):
        choose_addresses(0, replicas)


def test_replicas_are_read_from_a_line() -> None:
    assert parse_replicas("state=2,gateway=3") == {"state": 2, "gateway": 3}
    assert parse_replicas("") == {}
    with pytest.raises(StartError, match="state=2,gateway=3"):
        parse_replicas("state")


def test_a_role_keeps_its_password_and_no_other_has_it() -> None:
    owner = "postgresql://owner:s%C3%A9cret@db.example:6432/mainspring?sslmode=require"
    state, registry = role_url(owner, "mainspring_state"), role_url(owner, "mainspring_registry")
    assert state == role_url(owner, "mainspring_state")
    assert state.startswith("postgresql://mainspring_state:dev-")
    assert state.endswith("@db.example:6432/mainspring?sslmode=require")
    assert state.split(":")[2] != registry.split(":")[2]
    assert "s%C3%A9cret" not in state


def test_a_role_of_the_embedded_server_keeps_the_socket() -> None:
    assert role_url("postgresql://postgres@/mainspring?host=/tmp/x", "mainspring_state").endswith(
        "@/mainspring?host=/tmp/x"
    )


def test_only_who_keeps_something_gets_a_database(tmp_path: Path) -> None:
    found = launches(tmp_path)
    assert set(found) == set(PROCESSES)
    assert {name for name, launch in found.items() if "MAINSPRING_DATABASE_URL" in launch.env} == {"state", "registry"}
    assert "mainspring_registry:" in found["registry"].env["MAINSPRING_DATABASE_URL"]
    assert all("MAINSPRING_OWNER_DATABASE_URL" not in launch.env for launch in found.values())
    assert "MAINSPRING_REDIS_URL" not in found["execution"].env


def test_a_migration_gets_the_owner_and_its_own_role() -> None:
    env = migration_env(make_plan(), "state")
    assert env["MAINSPRING_OWNER_DATABASE_URL"] == make_plan().database_url
    assert "mainspring_state:" in env["MAINSPRING_DATABASE_URL"]
    assert [name for name in env if name.endswith("_SECRET")] == []


def test_replicas_have_labels_logs_and_all_addresses(tmp_path: Path) -> None:
    found = launches(tmp_path, state=2)
    assert {"state.0", "state.1"} <= set(found)
    assert found["state.1"].log != found["state.0"].log
    listens = [found[label].env["MAINSPRING_LISTEN"] for label in ("state.0", "state.1")]
    assert found["gateway"].env["MAINSPRING_STATE_TARGET"] == ",".join(listens)


def test_the_worker_gets_a_token_and_no_secret(tmp_path: Path) -> None:
    (launch,) = worker_launches(make_plan(), Folder(tmp_path))
    assert SECRETS.auth not in launch.env.values()
    assert SECRETS.service not in launch.env.values()
    claims = jwt.decode(launch.env["MAINSPRING_TOKEN"], SECRETS.service, algorithms=["HS256"], audience="mainspring")
    assert (claims["iss"], claims["roles"], claims["tenant"]) == ("mainspring-service", ["service"], "")
    assert launch.argv[-2:] == ("mainspring.diagnostics", "shop")
    assert launch.env["EXTRA"] == "1"


def test_several_workers_have_labels_logs_and_ready_files(tmp_path: Path) -> None:
    first, second = worker_launches(make_plan(worker=2), Folder(tmp_path))
    assert (first.label, second.label) == ("worker.0", "worker.1")
    assert first.log != second.log
    assert first.argv != second.argv


def test_the_developers_token_is_an_admins(tmp_path: Path) -> None:
    claims = jwt.decode(make_plan().token(), SECRETS.auth, algorithms=["HS256"], audience="mainspring")
    assert (claims["iss"], claims["tenant"], claims["sub"], claims["roles"]) == (
        "mainspring",
        "dev",
        "developer",
        ["admin"],
    )


def test_what_belongs_to_one_process_is_not_inherited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAINSPRING_METRICS_LISTEN", "127.0.0.1:9090")
    monkeypatch.setenv("MAINSPRING_INSTANCE_ID", "one")
    assert not {"MAINSPRING_METRICS_LISTEN", "MAINSPRING_INSTANCE_ID"} & set(launches(tmp_path)["state"].env)


def test_the_installed_grpc_knows_the_switches_that_every_process_is_started_with(tmp_path: Path) -> None:
    plan = make_plan()
    folder = Folder(tmp_path)
    started = service_launches(plan, folder) + worker_launches(plan, folder)
    assert {launch.env["GRPC_EXPERIMENTS"] for launch in started} == {GRPC_EXPERIMENTS}
    assert f"ENV GRPC_EXPERIMENTS={GRPC_EXPERIMENTS}\n" in (Path(__file__).parents[3] / "Dockerfile").read_text()

    loaded = subprocess.run(
        [sys.executable, "-c", "import grpc"],
        env=os.environ | {"GRPC_EXPERIMENTS": GRPC_EXPERIMENTS},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert loaded.stderr == ""
