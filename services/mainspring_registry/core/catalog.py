"""How the catalog is read: names and versions asked for, pages and their tokens, where a watcher begins."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final

from mainspring.v1 import registry_pb2
from mainspring_kit.errors import MainspringError, Reason, Violation

PAGE_SIZE_DEFAULT: Final = 50
# Pages and frames end after the item that reaches this; no item is larger than 256 KiB.
PAGE_BYTES_MAX: Final = 2 << 20
FRAME_BYTES_MAX: Final = 1 << 20
FRAME_ITEMS_MAX: Final = 256
ALIAS_DEFAULT: Final = "stable"
VERSION_MAX: Final = 999_999_999

_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,62}")
_VERSION: Final = re.compile(r"[1-9][0-9]{0,8}")


def read_name(name: str) -> str:
    """An agent's name that may exist; AGENT_NOT_FOUND for one that cannot."""
    if not _NAME.fullmatch(name):
        raise agent_not_found(name)
    return name


def read_version(name: str, version: str) -> int:
    """A version's number that may exist, 0 for none given; VERSION_NOT_FOUND for one that cannot."""
    if not version:
        return 0
    if not _VERSION.fullmatch(version):
        raise version_not_found(name, version)
    return int(version)


def resolve_version(request: registry_pb2.ResolveAgentRequest) -> int:
    """The version's number that a name with an alias or version means; 0: the newest, which is what `stable` means."""
    if not request.version and request.alias not in ("", ALIAS_DEFAULT):
        raise version_not_found(request.name, request.alias)
    return read_version(request.name, request.version)


def agent_not_found(name: str) -> MainspringError:
    """AGENT_NOT_FOUND for this name."""
    return MainspringError(
        Reason.AGENT_NOT_FOUND,
        f"There is no agent {name[:63]!r} in this tenant: register it first, or list the agents for the right name.",
        agent=name[:63],
    )


def version_not_found(name: str, version: str) -> MainspringError:
    """VERSION_NOT_FOUND for this version or alias."""
    return MainspringError(
        Reason.VERSION_NOT_FOUND,
        f"The agent {name!r} has no version or alias {version!r}: list its versions for one that it has.",
        agent=name,
        version=version,
    )


def read_filters(request: registry_pb2.ListAgentsRequest) -> registry_pb2.ListAgentsRequest:
    """The request, when its filters are texts that could be found; REQUEST_INVALID otherwise."""
    texts = {"capability": request.capability, "text": request.text}
    texts |= {f"labels.{key[:63]}": key + value for key, value in request.labels.items()}
    for field, text in texts.items():
        if "\x00" in text:
            raise _request_invalid(field, "holds a NUL character")
    return request


def read_page_size(page_size: int) -> int:
    """How many items a page holds at most."""
    return page_size or PAGE_SIZE_DEFAULT


def write_token(last: str) -> str:
    """The token of the page after the item of this name or version; an empty one for no further page."""
    return base64.urlsafe_b64encode(last.encode()).decode().rstrip("=")


def read_token(token: str) -> str:
    """The name that a token of ListAgents or ListTools holds; empty: before the first. REQUEST_INVALID if malformed."""
    try:
        last = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError) as error:
        raise _token_invalid() from error
    if "\x00" in last:
        raise _token_invalid()
    return last


def read_version_token(token: str) -> int:
    """The version's number that a token of ListVersions holds; above all for none."""
    if not token:
        return VERSION_MAX + 1
    last = read_token(token)
    if not _VERSION.fullmatch(last):
        raise _token_invalid()
    return int(last)


def begin_watch(after_revision: int, newest: int) -> int:
    """The revision after which a watcher begins: 0 too for one that comes from the future, of another database."""
    return after_revision if after_revision <= newest else 0


def _token_invalid() -> MainspringError:
    return _request_invalid("page_token", "is not a token of an earlier page")


def _request_invalid(field: str, fault: str) -> MainspringError:
    return MainspringError(
        Reason.REQUEST_INVALID,
        f"The request breaks its rules: {field}: {fault}.",
        violations=[Violation(field, fault)],
        field=field,
    )
