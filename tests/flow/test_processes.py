"""Five processes, each by itself: who they are, what they serve, how they are, and that none answers a stranger."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mainspring.v1 import dispatcher_pb2, execution_pb2, registry_pb2, state_pb2

from test_framework.grpc_testing import descriptor_of, error_of, stub_class
from test_framework.identities import make_context
from test_framework.stack import PROCESSES, Stack
from test_framework.user import User

pytestmark = [pytest.mark.flow, pytest.mark.real_services]

BUF = Path(sys.executable).parent / "buf"
SERVICES = ("Registry", "Dispatcher", "Execution", "State")
CALL_SECONDS = 10
COMMAND_SECONDS = 30
# One unary method of each service, with a request that breaks no rule.
REQUESTS = {
    "Registry": ("ListAgents", registry_pb2.ListAgentsRequest()),
    "Dispatcher": ("CancelCalls", dispatcher_pb2.CancelCallsRequest(tenant_id="acme", call_ids=["call"])),
    "Execution": ("CancelRun", execution_pb2.CancelRunRequest(run_id="run")),
    "State": ("ListRuns", state_pb2.ListRunsRequest()),
}


def buf_curl(stack: Stack, service: str, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """Runs `buf curl`, which knows of the contracts only what the process tells by reflection."""
    url = f"http://{stack.services[service.lower()][0]}{path}"
    command = [str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", *arguments, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)


def test_five_processes_have_five_pids_and_are_what_they_say(real_services_fixture: Stack) -> None:
    pids = {name: real_services_fixture.pids[name] for name in PROCESSES}
    assert len({pid for each in pids.values() for pid in each}) == len(PROCESSES) == 5
    for name, each in pids.items():
        assert f"mainspring_{name}" in psutil.Process(each[0]).cmdline(), name


@pytest.mark.parametrize("service", SERVICES)
async def test_a_service_says_that_it_lives_and_is_ready(real_services_fixture: Stack, service: str) -> None:
    names = ("", "liveness", "readiness", f"mainspring.v1.{service}Service")
    async with grpc.aio.insecure_channel(real_services_fixture.services[service.lower()][0]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answers = [
            await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=CALL_SECONDS) for name in names
        ]
        with pytest.raises(grpc.RpcError) as unknown:
            await stub.Check(health_pb2.HealthCheckRequest(service="no.such.Service"), timeout=CALL_SECONDS)
    assert [answer.status for answer in answers] == [health_pb2.HealthCheckResponse.SERVING] * len(names)
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


async def test_the_gateway_says_that_it_lives_and_is_ready(real_services_fixture: Stack) -> None:
    async with User(real_services_fixture, make_context()) as someone:
        assert [(await someone.http("GET", path)).status for path in ("/healthz", "/readyz")] == [200, 200]


@pytest.mark.parametrize("service", SERVICES)
def test_any_client_with_reflection_finds_what_a_service_serves(real_services_fixture: Stack, service: str) -> None:
    listed = buf_curl(real_services_fixture, service, "--list-services")
    assert listed.returncode == 0, listed.stderr
    ours = {name for name in listed.stdout.split() if name.startswith("mainspring.")}
    assert ours == {f"mainspring.v1.{service}Service"}

    methods = buf_curl(real_services_fixture, service, "--list-methods")
    assert methods.returncode == 0, methods.stderr
    described = {
        f"{descriptor_of(name).full_name}/{method.name}" for name in ours for method in descriptor_of(name).methods
    }
    assert described <= set(methods.stdout.split())


@pytest.mark.security
@pytest.mark.parametrize("service", SERVICES)
async def test_a_call_without_a_token_is_refused(real_services_fixture: Stack, service: str) -> None:
    method, request = REQUESTS[service]
    async with grpc.aio.insecure_channel(real_services_fixture.services[service.lower()][0]) as channel:
        with pytest.raises(grpc.RpcError) as raised:
            await getattr(stub_class(service)(channel), method)(request, timeout=CALL_SECONDS)
    assert error_of(raised.value) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING", {})


@pytest.mark.security
def test_any_client_is_told_why_it_is_refused_and_answered_with_a_token(real_services_fixture: Stack) -> None:
    path = "/mainspring.v1.StateService/ListRuns"
    refused = buf_curl(real_services_fixture, "State", "--data", "{}", path=path)
    assert refused.returncode != 0
    told = json.loads(refused.stderr)
    assert told["code"] == "unauthenticated"
    assert [detail["type"] for detail in told["details"]] == ["google.rpc.ErrorInfo"]

    token = real_services_fixture.identities.token("acme", "ann", "viewer")
    answered = buf_curl(
        real_services_fixture, "State", "--data", "{}", "--header", f"authorization: Bearer {token}", path=path
    )
    assert (answered.returncode, json.loads(answered.stdout)) == (0, {}), answered.stderr
