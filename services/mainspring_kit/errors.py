"""The one error of the platform and its way through google.rpc.Status; owns no reason of its own.

    Exception
    ├── MainspringError          a reason of `ErrorReason`, a message that says what to do next, and metadata
    └── SettingsError            (config.py) the environment does not describe a process that could run

The reasons, with their gRPC code, HTTP status, WebSocket close code and metadata keys, are the enum `ErrorReason` of
`protos/mainspring/v1/errors.proto`; this module reads its options, so that the table exists once, for every language.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from mainspring.v1 import errors_pb2

DOMAIN: Final = "mainspring"
MESSAGE_CHARACTERS_MAX: Final = 2_048
VIOLATIONS_MAX: Final = 20
RETRY_DELAY_SECONDS_DEFAULT: Final = 1.0

_PREFIX: Final = "ERROR_REASON_"
_GRPC_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class Rule:
    """How a reason travels. `close_code` 0: it never closes a WebSocket. `code` UNKNOWN: the raiser's own."""

    number: int
    name: str
    code: grpc.StatusCode
    http_status: int
    close_code: int


def _read_rules() -> Mapping[str, Rule]:
    rules = {}
    for value in errors_pb2.ErrorReason.DESCRIPTOR.values:
        if value.number == 0:
            continue
        option = value.GetOptions().Extensions[errors_pb2.rule]
        name = value.name.removeprefix(_PREFIX)
        rules[name] = Rule(value.number, name, _GRPC_CODES[option.code], option.http_status, option.close_code)
    return MappingProxyType(rules)


RULES: Final = _read_rules()

# The first reason of a code is its plainest one.
_HTTP_BY_CODE: Final = {rule.code: rule.http_status for rule in reversed(list(RULES.values()))}


class _Reasons:
    """`Reason.RUN_NOT_FOUND` is the rule of that reason; a name that the contract lacks is an AttributeError."""

    def __getattr__(self, name: str) -> Rule:
        try:
            return RULES[name]
        except KeyError:
            raise AttributeError(f"errors.proto has no reason {name}") from None


Reason: Final = _Reasons()


@dataclass(frozen=True, slots=True)
class Violation:
    """One fault of a request: the field's path and what is wrong with it."""

    field: str
    description: str


class MainspringError(Exception):
    """An error that may leave the process: what went wrong, which one, and what to do next.

    `metadata` values are turned into text; `code` is only for reasons whose rule leaves it open.
    """

    def __init__(
        self,
        reason: Rule,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        retry_after_seconds: float | None = None,
        violations: Sequence[Violation] = (),
        **metadata: object,
    ) -> None:
        super().__init__(message)
        self.rule = reason
        self.message = message[:MESSAGE_CHARACTERS_MAX]
        self.code = code or reason.code
        if retry_after_seconds is None and self.code in _RETRYABLE:
            retry_after_seconds = RETRY_DELAY_SECONDS_DEFAULT
        self.retry_after_seconds = retry_after_seconds
        if not violations and metadata.get("field") and self.code is grpc.StatusCode.INVALID_ARGUMENT:
            violations = [Violation(str(metadata["field"]), self.message)]
        self.violations = tuple(violations[:VIOLATIONS_MAX])
        self.metadata: dict[str, str] = {key: str(value) for key, value in metadata.items()}

    @property
    def reason_name(self) -> str:
        """The reason without its prefix, as ErrorInfo and the socket carry it."""
        return self.rule.name

    @property
    def http_status(self) -> int:
        """The HTTP status of the code in force."""
        return self.rule.http_status if self.code is self.rule.code else _HTTP_BY_CODE.get(self.code, 500)

    @property
    def close_code(self) -> int:
        """The WebSocket close code; 0: it does not close the socket."""
        return self.rule.close_code

    def __str__(self) -> str:
        return f"{self.code.name}/{self.reason_name}: {self.message}"


_RETRYABLE: Final = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED})


def to_status(error: MainspringError) -> status_pb2.Status:
    """Packs an error with the details of its code: ErrorInfo always, the others where they apply."""
    status = status_pb2.Status(code=error.code.value[0], message=error.message)
    info = error_details_pb2.ErrorInfo(reason=error.reason_name, domain=DOMAIN, metadata=error.metadata)
    _add(status, info)
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_seconds * 1e9))
        _add(status, error_details_pb2.RetryInfo(retry_delay=delay))
    if error.violations:
        fault_of = error_details_pb2.BadRequest.FieldViolation
        fields = [fault_of(field=fault.field, description=fault.description) for fault in error.violations]
        _add(status, error_details_pb2.BadRequest(field_violations=fields))
    first_key, first_value = next(iter(error.metadata.items()), ("", ""))
    if error.code is grpc.StatusCode.NOT_FOUND:
        _add(status, error_details_pb2.ResourceInfo(resource_type=first_key, resource_name=first_value))
    elif error.code is grpc.StatusCode.FAILED_PRECONDITION:
        violation = error_details_pb2.PreconditionFailure.Violation(
            type=error.reason_name, subject=first_value, description=error.message
        )
        _add(status, error_details_pb2.PreconditionFailure(violations=[violation]))
    elif error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        quota = error_details_pb2.QuotaFailure.Violation(subject=first_value, description=error.message)
        _add(status, error_details_pb2.QuotaFailure(violations=[quota]))
    return status


def from_status(status: status_pb2.Status) -> MainspringError:
    """Unpacks what `to_status` packed; a status of other origin becomes the nearest reason of ours."""
    code = _GRPC_CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    rule, metadata = _reason_of_code(code), {}
    retry_after_seconds: float | None = None
    violations: list[Violation] = []
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
            if info.domain == DOMAIN and info.reason in RULES:
                rule, metadata = RULES[info.reason], dict(info.metadata)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
            retry_after_seconds = delay.ToNanoseconds() / 1e9
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            faults = error_details_pb2.BadRequest.FromString(detail.value).field_violations
            violations = [Violation(fault.field, fault.description) for fault in faults]
    error = MainspringError(
        rule, status.message, code=code, retry_after_seconds=retry_after_seconds, violations=violations
    )
    error.metadata = metadata
    return error


def from_rpc_error(error: grpc.RpcError) -> MainspringError:
    """What a failed call means; the one place that reads an RpcError."""
    status = rpc_status.from_call(error)
    if status is None:
        status = status_pb2.Status(code=error.code().value[0], message=error.details() or error.code().name)
    return from_status(status)


def _reason_of_code(code: grpc.StatusCode) -> Rule:
    name = {
        grpc.StatusCode.UNAVAILABLE: "PEER_UNAVAILABLE",
        grpc.StatusCode.DEADLINE_EXCEEDED: "DEADLINE_EXCEEDED",
        grpc.StatusCode.CANCELLED: "CANCELLED",
        grpc.StatusCode.RESOURCE_EXHAUSTED: "PAYLOAD_TOO_LARGE",
        grpc.StatusCode.UNIMPLEMENTED: "NOT_IMPLEMENTED",
        grpc.StatusCode.INVALID_ARGUMENT: "REQUEST_INVALID",
        grpc.StatusCode.UNAUTHENTICATED: "TOKEN_INVALID",
    }.get(code, "INTERNAL")
    return RULES[name]


def _add(status: status_pb2.Status, detail: object) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)  # type: ignore[arg-type]  # any generated message
    status.details.append(packed)
