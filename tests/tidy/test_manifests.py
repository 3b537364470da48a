"""The manifests and the image against the code: modules, settings, ports, probes and restrictions agree."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any, Final

import pytest
import yaml
from mainspring_kit.config import ENVIRONMENT_PREFIX, ProcessSettings

from tests.tidy.source import ROOT, SERVICES
from tests.tidy.tables import settings_classes

pytestmark = pytest.mark.tidy

K8S: Final = ROOT / "k8s"
# Any: what YAML holds.
Manifest = dict[str, Any]


@cache
def base(name: str) -> tuple[Manifest, ...]:
    """The documents of one file of the base."""
    return tuple(yaml.safe_load_all((K8S / "base" / f"{name}.yaml").read_text()))


@cache
def shared_environment() -> dict[str, str]:
    """What all processes get from the generated ConfigMap."""
    (generator,) = yaml.safe_load((K8S / "base/kustomization.yaml").read_text())["configMapGenerator"]
    return dict(literal.split("=", 1) for literal in generator["literals"])


def deployment(service: str) -> Manifest:
    """The Deployment of a service."""
    return next(document for document in base(service) if document["kind"] == "Deployment")


def workloads() -> Iterator[tuple[str, Manifest]]:
    """Each pod template of base and components by name."""
    for path in sorted(K8S.rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if document and "template" in document.get("spec", {}):
                yield document["metadata"]["name"], document["spec"]["template"]["spec"]


def environment_faults(pod: Manifest, settings: type[ProcessSettings]) -> list[str]:
    """Variables that the settings do not know, and settings without a value or default."""
    (container,) = pod["containers"]
    own = {variable["name"] for variable in container["env"]}
    shared = set(shared_environment()) if container.get("envFrom") else set()
    known = {ENVIRONMENT_PREFIX + name.upper(): field for name, field in settings.model_fields.items()}
    needed = {name for name, field in known.items() if field.is_required()}
    faults = [f"{settings.__name__} reads no {name}" for name in sorted(own - known.keys())]
    return faults + [f"{settings.__name__} is not given {name}" for name in sorted(needed - own - shared)]


def loose_pod(name: str, pod: Manifest) -> list[str]:
    """What a pod lacks of the restricted standard, of probes or of bounds."""
    faults = []
    security = pod.get("securityContext", {})
    if not security.get("runAsNonRoot") or security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        faults.append(f"{name}: must not run as root, under the runtime's seccomp profile")
    if pod.get("automountServiceAccountToken") is not False:
        faults.append(f"{name}: mounts a token that it does not need")
    for container in pod["containers"]:
        limits = container.get("securityContext", {})
        wanted = {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        if limits != wanted:
            faults.append(f"{name}: is not restricted")
        if set(container.get("resources", {})) != {"requests", "limits"}:
            faults.append(f"{name}: has no requests and limits")
        probes = {"startupProbe", "livenessProbe", "readinessProbe"}
        if pod.get("restartPolicy") is None and not probes <= container.keys():
            faults.append(f"{name}: lacks a probe")
    return faults


@pytest.mark.parametrize("service", SERVICES)
def test_a_file_holds_one_process(service: str) -> None:
    assert [document["kind"] for document in base(service)] == ["ServiceAccount", "Service", "Deployment"]


@pytest.mark.parametrize("service", SERVICES)
def test_the_module_in_args_exists(service: str) -> None:
    (container,) = deployment(service)["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["python", "-m", f"mainspring_{service}"]
    assert find_spec(f"mainspring_{service}.__main__") is not None


def test_migrations_run_for_every_service_that_has_them() -> None:
    jobs = [document["spec"]["template"]["spec"]["containers"][0]["args"] for document in base("migrate")]
    owners = sorted(path.parts[-3] for path in ROOT.glob("services/*/sql/migrations"))
    assert sorted(args[2] for args in jobs) == owners
    assert all(args[3:] == ["migrate"] for args in jobs)


@pytest.mark.parametrize("service", SERVICES)
def test_settings_and_manifests_agree(service: str) -> None:
    pod = deployment(service)["spec"]["template"]["spec"]
    assert environment_faults(pod, settings_classes(service)[0]) == []


def test_settings_and_migrations_agree() -> None:
    for document in base("migrate"):
        pod = document["spec"]["template"]["spec"]
        service = pod["containers"][0]["args"][2].removeprefix("mainspring_")
        assert environment_faults(pod, settings_classes(service)[-1]) == []


def test_shared_settings_are_read_by_somebody() -> None:
    known = {
        ENVIRONMENT_PREFIX + name.upper() for service in SERVICES for name in settings_classes(service)[0].model_fields
    }
    assert shared_environment().keys() - known == set()


@pytest.mark.parametrize("service", SERVICES)
def test_ports_agree(service: str) -> None:
    (container,) = deployment(service)["spec"]["template"]["spec"]["containers"]
    listen = next(variable["value"] for variable in container["env"] if variable["name"] == "MAINSPRING_LISTEN")
    port = int(listen.rpartition(":")[2])
    ports = {entry["name"]: entry["containerPort"] for entry in container["ports"]}
    front = next(document for document in base(service) if document["kind"] == "Service")
    assert port == ports["http" if service == "gateway" else "grpc"]
    assert [entry["port"] for entry in front["spec"]["ports"]] == [port]
    target = shared_environment().get(f"MAINSPRING_{service.upper()}_TARGET")
    assert target == (None if service == "gateway" else f"dns:///mainspring-{service}:{port}")
    assert str(ports["metrics"]) == shared_environment()["MAINSPRING_METRICS_LISTEN"].rpartition(":")[2]


@pytest.mark.parametrize("service", SERVICES)
def test_probes_ask_what_the_process_answers(service: str) -> None:
    (container,) = deployment(service)["spec"]["template"]["spec"]["containers"]
    asked = {kind: container[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness")}
    if service == "gateway":
        paths = {kind: probe["httpGet"]["path"] for kind, probe in asked.items()}
        assert paths == {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}
    else:
        names = {kind: probe["grpc"]["service"] for kind, probe in asked.items()}
        assert names == {"startup": "liveness", "liveness": "liveness", "readiness": "readiness"}


@pytest.mark.parametrize("service", SERVICES)
def test_a_pod_has_time_to_drain(service: str) -> None:
    pod = deployment(service)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = float(shared_environment()["MAINSPRING_DRAIN_SECONDS"])
    # Once for what the process itself finishes, once for the calls of its server.
    assert pod["terminationGracePeriodSeconds"] > before + 2 * drain


def test_pods_are_restricted_and_bounded() -> None:
    assert [fault for name, pod in workloads() for fault in loose_pod(name, pod)] == []


def test_development_secrets_stay_in_development() -> None:
    for path in K8S.rglob("*.yaml"):
        if "=dev-" in path.read_text():
            assert path.parent.name == "dev"
            assert "MAINSPRING_ENVIRONMENT=development" in path.read_text()


def test_the_image_copies_what_exists() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        path for line in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE) for path in line.split()
    }
    assert copied == let_in
    assert [path for path in copied if not (ROOT / path).exists()] == []
    assert re.search(r"^USER 10001", dockerfile, re.MULTILINE)
    assert re.findall(r"pip install(?! --require-hashes| --no-deps)", dockerfile) == []


def test_a_strange_or_missing_variable_is_found() -> None:
    pod = copy.deepcopy(deployment("state")["spec"]["template"]["spec"])
    (container,) = pod["containers"]
    container["env"] = [entry for entry in container["env"] if entry["name"] != "MAINSPRING_DATABASE_URL"]
    container["env"].append({"name": "MAINSPRING_DATABASE_URI", "value": "x"})
    assert len(environment_faults(pod, settings_classes("state")[0])) == 2


def test_a_loose_pod_is_found() -> None:
    pod = copy.deepcopy(deployment("state")["spec"]["template"]["spec"])
    assert loose_pod("state", pod) == []
    pod["securityContext"]["runAsNonRoot"] = False
    del pod["containers"][0]["livenessProbe"]
    del pod["containers"][0]["resources"]["limits"]
    pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"] = False
    assert len(loose_pod("state", pod)) == 4
