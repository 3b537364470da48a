"""What a local stack consists of: which processes, with which environment. Pure but for choosing free ports."""

from __future__ import annotations

import hmac
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final
from urllib.parse import quote, urlsplit, urlunsplit

from mainspring.dev.folder import Folder, Secrets
from mainspring.dev.probe import file_names_pid, free_ports, grpc_ready, http_ready
from mainspring.embedded.launch import Launch, StartError
from mainspring.tokens import service_token, user_token

SERVICES: Final = ("registry", "dispatcher", "execution", "state")
PROCESSES: Final = (*SERVICES, "gateway")
WORKER: Final = "worker"
WITH_DATABASE: Final = ("state", "registry")
WITH_REDIS: Final = ("state", "registry", "dispatcher", "gateway")
# The order in which a stack ends: who asks before who answers.
STOP_ORDER: Final = ("worker", "gateway", "execution", "dispatcher", "registry", "state", "redis", "postgres")
DIAGNOSTICS: Final = "mainspring.diagnostics"
TENANT: Final = "dev"
USER: Final = "developer"
TOKEN_SECONDS: Final = 7 * 24 * 3600
REPLICAS_MAX: Final = 16

# Within the 5 s that a stack may outlive its supervisor.
_DRAIN_SECONDS: Final = 2
_SERVICE_TOKEN_SECONDS: Final = 365 * 24 * 3600
# gRPC's former I/O loop costs a fifth less CPU per frame than its event engine (docs/decisions/0009).
GRPC_EXPERIMENTS: Final = "-event_engine_client,-event_engine_listener"
# Of one process each: inherited, they would be all processes'.
_NOT_INHERITED: Final = ("MAINSPRING_METRICS_LISTEN", "MAINSPRING_INSTANCE_ID", "MAINSPRING_TOKEN", "MAINSPRING_URL")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything about a stack that is known before its first service starts, and stays over restarts."""

    secrets: Secrets
    database_url: str
    redis_url: str
    addresses: Mapping[str, tuple[str, ...]]
    workers: tuple[str, ...] | None
    worker_replicas: int = 1
    extra_env: Mapping[str, str] = field(default_factory=dict)

    @property
    def gateways(self) -> tuple[str, ...]:
        """The gateways' URLs."""
        return tuple(f"http://{address}" for address in self.addresses["gateway"])

    @property
    def service_database_urls(self) -> dict[str, str]:
        """What state and registry connect with, each as its own role."""
        return {name: role_url(self.database_url, f"mainspring_{name}") for name in WITH_DATABASE}

    def target(self, service: str) -> str:
        """Where a service is, all its replicas."""
        return ",".join(self.addresses[service])

    def token(self) -> str:
        """A fresh token of the developer, who may do everything in the tenant `dev`."""
        return user_token(self.secrets.auth, tenant=TENANT, user=USER, roles=("admin",), ttl_seconds=TOKEN_SECONDS)


def choose_addresses(port: int, replicas: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """An address for each replica of each process; `port` is the first gateway's, 0: any."""
    unknown = set(replicas) - {*PROCESSES, WORKER}
    if unknown or not all(1 <= count <= REPLICAS_MAX for count in replicas.values()):
        raise StartError(
            f"Replicas are given as one of {', '.join(PROCESSES)}, {WORKER} with 1 to {REPLICAS_MAX}, "
            f"not {', '.join(f'{name}={count}' for name, count in replicas.items())}."
        )
    counts = {name: replicas.get(name, 1) for name in PROCESSES}
    ports = free_ports(sum(counts.values()))
    if port:
        ports[-counts["gateway"]] = port
    chosen = {}
    for name, count in counts.items():
        chosen[name] = tuple(f"127.0.0.1:{number}" for number in ports[:count])
        del ports[:count]
    return chosen


def role_url(owner_url: str, role: str) -> str:
    """The owner's URL with a service's role in it. Its password follows from the owner's, so nobody has to keep it."""
    parts = urlsplit(owner_url)
    password = "dev-" + hmac.digest((parts.password or "").encode(), role.encode(), "sha256").hex()[:32]
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{quote(role)}:{password}@{host}"))


def service_launches(plan: Plan, folder: Folder) -> list[Launch]:
    """The five processes, in the order of SERVICES and then the gateway."""
    launches = []
    for name in PROCESSES:
        addresses = plan.addresses[name]
        for index, address in enumerate(addresses):
            is_gateway = name == "gateway"
            ready = partial(http_ready, f"http://{address}") if is_gateway else partial(grpc_ready, address)
            launch = Launch(
                name=name,
                argv=(sys.executable, "-m", f"mainspring_{name}", "serve"),
                env={**_service_env(plan, name), "MAINSPRING_LISTEN": address},
                log=folder.log(name if len(addresses) == 1 else f"{name}.{index}"),
                ready=ready,
                watches_parent=True,
                index=index,
                replicas=len(addresses),
            )
            launches.append(launch)
    return launches


def migration_env(plan: Plan, service: str) -> dict[str, str]:
    """What `python -m mainspring_<service> migrate` needs."""
    return {
        **_inherited(),
        "MAINSPRING_DATABASE_URL": plan.service_database_urls[service],
        "MAINSPRING_OWNER_DATABASE_URL": plan.database_url,
        **plan.extra_env,
    }


def parse_replicas(text: str) -> dict[str, int]:
    """`state=2,gateway=3` as numbers by process."""
    try:
        return {name.strip(): int(count) for name, count in (part.split("=") for part in text.split(",") if part)}
    except ValueError as error:
        raise StartError(f"Replicas are written as state=2,gateway=3, not {text!r}.") from error


def worker_launches(plan: Plan, folder: Folder) -> list[Launch]:
    """The stack's own workers, if it has any. They get no secret, only a token: tools are the user's code."""
    if plan.workers is None:
        return []
    return [_worker_launch(plan, folder, index=index) for index in range(plan.worker_replicas)]


def _worker_launch(plan: Plan, folder: Folder, *, index: int) -> Launch:
    label = WORKER if plan.worker_replicas == 1 else f"{WORKER}.{index}"
    ready_file = folder.path / f"{label}.ready"
    return Launch(
        name=WORKER,
        argv=(
            *(sys.executable, "-m", "mainspring", "worker", "--ready-file", str(ready_file)),
            *(DIAGNOSTICS, *(plan.workers or ())),
        ),
        env=_worker_env(plan),
        log=folder.log(label),
        ready=partial(file_names_pid, ready_file),
        watches_parent=True,
        index=index,
        replicas=plan.worker_replicas,
    )


def _worker_env(plan: Plan) -> dict[str, str]:
    return {
        **_inherited(),
        "MAINSPRING_ENVIRONMENT": "development",
        "MAINSPRING_DRAIN_SECONDS": str(_DRAIN_SECONDS),
        "MAINSPRING_DISPATCHER_TARGET": plan.target("dispatcher"),
        "MAINSPRING_TOKEN": service_token(plan.secrets.service, name="worker", ttl_seconds=_SERVICE_TOKEN_SECONDS),
        **plan.extra_env,
    }


def _service_env(plan: Plan, name: str) -> dict[str, str]:
    env = {
        **_inherited(),
        "MAINSPRING_ENVIRONMENT": "development",
        "MAINSPRING_AUTH_SECRET": plan.secrets.auth,
        "MAINSPRING_SERVICE_SECRET": plan.secrets.service,
        "MAINSPRING_DRAIN_SECONDS": str(_DRAIN_SECONDS),
        **{f"MAINSPRING_{peer.upper()}_TARGET": plan.target(peer) for peer in SERVICES},
    }
    if name in WITH_DATABASE:
        env["MAINSPRING_DATABASE_URL"] = plan.service_database_urls[name]
    if name == "state":
        # The developer's own server is nearby.
        env["MAINSPRING_WEBHOOK_PRIVATE"] = "true"
    if name in WITH_REDIS:
        env["MAINSPRING_REDIS_URL"] = plan.redis_url
    return {**env, **plan.extra_env}


def _inherited() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    return {"GRPC_EXPERIMENTS": GRPC_EXPERIMENTS, **inherited}
