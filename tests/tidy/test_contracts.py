"""What the contracts promise by options and comments: roles, reasons, metadata, and the code that raises them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Final

import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.rpc import code_pb2
from mainspring.v1 import errors_pb2, identity_pb2

from tests.tidy.source import ROOT, Module, called, modules, written

pytestmark = pytest.mark.tidy

CONTRACTS: Final = ROOT / "protos/mainspring/v1"
# The close codes of the WebSocket that an error may lead to; 0 closes nothing.
CLOSE_CODES: Final = {0, 1009, 1011, 1012, 1013, 4008, 4400, 4401, 4403, 4406, 4408, 4429}
# Parameters of MainspringError that are no metadata.
PARAMETERS: Final = {"code", "retry_after_seconds", "violations"}

REASON: Final = re.compile(r"(?P<comment>(?:^  //.*\n)+)^  ERROR_REASON_(?P<name>\w+) = (?P<number>\d+)", re.MULTILINE)


def documented_reasons() -> dict[str, tuple[str, frozenset[str], bool]]:
    """Reason -> the gRPC code its comment names, its metadata keys, and whether others may join them."""
    found = {}
    for match in REASON.finditer((CONTRACTS / "errors.proto").read_text()):
        comment = " ".join(line.strip().removeprefix("//").strip() for line in match["comment"].splitlines())
        code, _, _ = comment.partition(":")
        metadata = re.search(r"Metadata: (.*?)(\.|$)", comment)
        listed = metadata[1] if metadata else ""
        keys = frozenset(re.findall(r"\b[a-z_]+\b", listed.split(", and ")[0]))
        found[match["name"]] = (code, keys, "and what" in listed)
    return found


def methods() -> list[MethodDescriptor]:
    """Every rpc of every service."""
    found: list[MethodDescriptor] = []
    for path in sorted(CONTRACTS.glob("*.proto")):
        descriptor = import_module(f"mainspring.v1.{path.stem}_pb2").DESCRIPTOR
        found.extend(method for service in descriptor.services_by_name.values() for method in service.methods)
    return found


def undocumented_raises(found: Iterable[Module], reasons: Mapping[str, tuple[str, frozenset[str], bool]]) -> list[str]:
    """Errors raised with a reason that the contract lacks, or with metadata that its comment does not name."""
    offences = []
    for module in found:
        for node in module.nodes:
            if isinstance(node, ast.Attribute) and called(node.value) == "Reason" and node.attr not in reasons:
                offences.append(module.offence(node, f"errors.proto has no reason {node.attr}"))
            if not isinstance(node, ast.Call) or called(node) != "MainspringError" or not node.args:
                continue
            reason = called(node.args[0]).removeprefix("Reason.")
            if reason not in reasons:
                continue
            _, keys, is_open = reasons[reason]
            for keyword in node.keywords:
                if keyword.arg and keyword.arg not in PARAMETERS | keys and not is_open:
                    offences.append(module.offence(node, f"errors.proto names no metadata {keyword.arg} for {reason}"))
    return offences


def test_every_method_names_its_least_role() -> None:
    assert [method.full_name for method in methods() if not method.GetOptions().Extensions[identity_pb2.role]] == []


def test_every_method_has_messages_of_its_own() -> None:
    for method in methods():
        assert method.input_type.name == f"{method.name}Request"
        assert method.output_type.name == f"{method.name}Response"


def test_every_reason_has_a_rule() -> None:
    for value in errors_pb2.ErrorReason.DESCRIPTOR.values:
        rule = value.GetOptions().Extensions[errors_pb2.rule]
        if value.number:
            assert rule.code, value.name
            assert 400 <= rule.http_status < 600, value.name
            assert rule.close_code in CLOSE_CODES, value.name


def test_every_reason_names_its_code_in_its_comment() -> None:
    reasons = documented_reasons()
    for value in errors_pb2.ErrorReason.DESCRIPTOR.values:
        if value.number:
            rule = value.GetOptions().Extensions[errors_pb2.rule]
            code = "Any code" if rule.code == code_pb2.UNKNOWN else code_pb2.Code.Name(rule.code)
            assert reasons[value.name.removeprefix("ERROR_REASON_")][0] == code


def test_errors_carry_what_the_contract_says() -> None:
    assert undocumented_raises(modules("services", "gateway"), documented_reasons()) == []


@pytest.mark.parametrize(
    "text",
    [
        'raise MainspringError(Reason.NO_SUCH_REASON, "…")',
        'raise MainspringError(Reason.RUN_NOT_FOUND, "…", run="r")',
    ],
)
def test_an_error_beside_the_contract_is_found(text: str) -> None:
    reasons = {"RUN_NOT_FOUND": ("NOT_FOUND", frozenset({"run_id"}), False)}
    assert len(undocumented_raises([written("services/mainspring_state/store.py", text)], reasons)) == 1
