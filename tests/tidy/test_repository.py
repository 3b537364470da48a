"""What surrounds the code: lock files, versions, and text that would only be true on one machine."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, Final

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.tidy.source import ROOT, text_files

pytestmark = pytest.mark.tidy

PINNED: Final = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;]+)", re.MULTILINE)
# Folders that exist on somebody's machine only.
MACHINE_PATH: Final = re.compile(r"(?<![\w.~$}-])/(?:home|root|Users|work|opt/wheels)/")
# Hosts that text may name: standards, licences, and what serves on the machine itself.
HOSTS: Final = re.compile(
    r"(localhost|127\.0\.0\.1|0\.0\.0\.0|\[::1\]|[\w.-]+\.(example|test|invalid)|example\.(com|org|net)|[\w-]+|json-schema\.org"
    r"|keepachangelog\.com|semver\.org|www\.apache\.org|www\.w3\.org|www\.rfc-editor\.org|google\.aip\.dev|[{<$].*)"
)
PAGE: Final = re.compile(r"(?<![\w/*<{.-])((?:[\w.-]+/)*[A-Za-z][\w-]*\.md)\b(?! merge=)")


def _project() -> dict[str, Any]:  # Any: what TOML holds
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def required(project: Mapping[str, Any], extras: Iterable[str]) -> list[Requirement]:
    """The direct requirements of the distribution with these extras, those of an extra within an extra too."""
    found = [Requirement(text) for text in project["dependencies"]]
    for extra in extras:
        for text in project["optional-dependencies"][extra]:
            requirement = Requirement(text)
            if requirement.name == project["name"]:
                found.extend(required(project, requirement.extras))
            else:
                found.append(requirement)
    return found


def pinned(lock: str) -> dict[str, list[str]]:
    """Name -> versions of a lock file."""
    found: dict[str, list[str]] = {}
    for match in PINNED.finditer(lock):
        found.setdefault(canonicalize_name(match["name"]), []).append(match["version"])
    return found


def stale(lock: str, requirements: Iterable[Requirement]) -> list[str]:
    """Requirements that a lock file does not hold, or in a version that they refuse."""
    versions = pinned(lock)
    return [
        f"{requirement}: run `make lock`"
        for requirement in requirements
        if not any(
            requirement.specifier.contains(version) for version in versions.get(canonicalize_name(requirement.name), [])
        )
    ]


def loose_pins(lock: str) -> list[str]:
    """Lines of a lock file with an address, and packages without a hash."""
    offences = [line for line in lock.splitlines() if "://" in line or line.startswith("-")]
    entries = re.split(r"\n(?=\S)", lock.strip())
    return offences + [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry]


def loose_packages(lock: Mapping[str, Any]) -> list[str]:  # Any: what JSON holds
    """Packages of npm in a lock file with the address of a registry, or without a hash."""
    return [
        path
        for path, package in lock["packages"].items()
        if path and ("resolved" in package or not package.get("integrity"))
    ]


def machine_paths(texts: Mapping[str, str]) -> list[str]:
    """Paths of one machine."""
    return _lines_with(texts, lambda line: bool(MACHINE_PATH.search(line)))


def foreign_hosts(texts: Mapping[str, str]) -> list[str]:
    """Addresses of hosts that the product does not need."""

    def names_one(line: str) -> bool:
        hosts = re.findall(r"\bhttps?://(?:[^@/\s\"'`]+@)?([^/:\s\"'`)>]+)", line)
        return any(not HOSTS.fullmatch(host) for host in hosts)

    return _lines_with(texts, names_one)


def missing_pages(texts: Mapping[str, str], pages: Iterable[str]) -> list[str]:
    """Pages that text names and the repository lacks."""
    known = {page.rpartition("/")[2] for page in pages}
    return _lines_with(
        texts,
        lambda line: any(
            page.rpartition("/")[2] not in known for page in PAGE.findall(re.sub(r"https?://\S+", "", line))
        ),
    )


def _lines_with(texts: Mapping[str, str], is_bad: Any) -> list[str]:  # Any: a predicate of a line
    return [
        f"{path}:{number}: {line.strip()}"
        for path, text in texts.items()
        if not path.startswith("tests/tidy/test_")
        for number, line in enumerate(text.splitlines(), start=1)
        if is_bad(line)
    ]


def test_lock_files_hold_what_the_project_needs() -> None:
    project = _project()
    everything = required(project, project["optional-dependencies"])
    assert stale((ROOT / "requirements.lock").read_text(), everything) == []
    assert stale((ROOT / "requirements.platform.lock").read_text(), required(project, ["platform"])) == []


def test_lock_files_have_hashes_and_no_addresses() -> None:
    for path in ROOT.glob("requirements*.lock"):
        assert loose_pins(path.read_text()) == []
    for path in (ROOT / "tests").rglob("package-lock.json"):
        assert loose_packages(json.loads(path.read_text())) == []


def test_the_image_runs_what_was_tested() -> None:
    tested = pinned((ROOT / "requirements.lock").read_text())
    for name, versions in pinned((ROOT / "requirements.platform.lock").read_text()).items():
        assert set(versions) <= set(tested[name]), name


def test_generated_code_runs_with_the_oldest_grpc_and_protobuf_allowed() -> None:
    floors = {
        requirement.name: Version(next(iter(requirement.specifier)).version) for requirement in required(_project(), [])
    }
    stub = (ROOT / "sdk/mainspring/v1/state_pb2_grpc.py").read_text()
    message = (ROOT / "sdk/mainspring/v1/state_pb2.py").read_text()
    grpc_version = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", stub)
    protobuf_version = re.search(r"^# Protobuf Python Version: ([\d.]+)$", message, re.MULTILINE)
    assert grpc_version is not None
    assert protobuf_version is not None
    assert floors["grpcio"] >= Version(grpc_version[1])
    assert floors["protobuf"] >= Version(protobuf_version[1])


def test_the_changelog_knows_the_version() -> None:
    version = _project()["version"]
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert version in headings[:2] or len(headings) == 1


def test_no_text_is_true_on_one_machine_only() -> None:
    assert machine_paths(text_files()) == []


def test_no_text_names_a_foreign_host() -> None:
    # Tests may make up hosts that nobody asks.
    assert foreign_hosts({path: text for path, text in text_files().items() if not path.startswith("tests/")}) == []


def test_every_page_that_is_named_exists() -> None:
    texts = text_files()
    pages = [*texts, *(path.relative_to(ROOT).as_posix() for path in (ROOT / "protos/third_party").glob("*.md"))]
    assert missing_pages(texts, pages) == []


def test_a_stale_lock_is_found() -> None:
    needed = [Requirement("aiohttp>=3.14"), Requirement("redis>=8")]
    assert stale("aiohttp==3.14.5 \\\n    --hash=sha256:1", needed) == ["redis>=8: run `make lock`"]
    assert len(stale("aiohttp==3.13.0\nredis==8.1", needed)) == 1


def test_a_loose_pin_is_found() -> None:
    assert loose_pins("a==1 \\\n    --hash=sha256:1\nb==1") == ["b==1"]
    assert loose_pins("--index-url x://y\na==1 \\\n    --hash=sha256:1") == ["--index-url x://y", "--index-url"]


@pytest.mark.parametrize("package", [{"version": "1"}, {"resolved": "https://npm.example/a", "integrity": "sha512-1"}])
def test_a_loose_package_is_found(package: dict[str, str]) -> None:
    assert loose_packages({"packages": {"": {}, "node_modules/a": package}}) == ["node_modules/a"]


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("see /home/ann/notes", 1),
        ("WORKDIR /Users/ann/src", 1),
        ("cd ~/home/src", 0),
        ("/healthz and ${HOME}/home/", 0),
    ],
)
def test_machine_paths_are_found(line: str, count: int) -> None:
    assert len(machine_paths({"a.md": line})) == count


def test_a_foreign_host_is_found() -> None:
    assert len(foreign_hosts({"a.md": "from https://packages.somewhere.net/simple"})) == 1
    assert foreign_hosts({"a.md": "curl http://127.0.0.1:8080/v1 and http://user:pw@localhost/"}) == []


def test_a_missing_page_is_found() -> None:
    assert len(missing_pages({"a.py": "# as in docs/nowhere.md says"}, ["docs/contracts.md"])) == 1
    assert missing_pages({"a.py": "# as in docs/contracts.md says"}, ["docs/contracts.md"]) == []
