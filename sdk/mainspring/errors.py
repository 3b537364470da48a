"""What users of the SDK raise and catch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

CODES: Final = frozenset(
    {
        "CANCELLED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
        "UNAUTHENTICATED",
    }
)


class ToolError(Exception):
    """A tool's failure with a meaning: raise it in a tool, and the run's log and the client see it as it is.

    `code` is the name of a gRPC code, `reason` a word of the tool's own in upper case, `message` says what went wrong,
    which one, and what to do next; `metadata` values are turned into text. Anything else that a tool raises becomes
    UNKNOWN / TOOL_FAILED.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "UNKNOWN",
        reason: str = "TOOL_FAILED",
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        if code not in CODES:
            raise ValueError(f"{code!r} is not the name of a gRPC code: use one of {', '.join(sorted(CODES))}")
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata = {key: str(value) for key, value in (metadata or {}).items()}


class DeclarationError(TypeError):
    """A function cannot be a tool as it is declared; the message says which one and what to change."""


class WorkerError(Exception):
    """A worker cannot start or go on; the message says why and what to do."""
