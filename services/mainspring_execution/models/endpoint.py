"""Where a model is asked: one entry of a specification's `model`, and what it says of the conversation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from mainspring_execution.core.conversation import KEEP_LAST_DEFAULT, TOKENS_DEFAULT, Window
from mainspring_execution.core.plan import AgentPlan, spec_invalid

PROVIDERS: Final = ("openai", "anthropic")
# A provider that says nothing for so long has gone away, whatever the time that the specification gives it.
SILENT_SECONDS_MAX: Final = 600.0
REPAIRS_DEFAULT: Final = 2
FALLBACKS_MAX: Final = 8

_CREDENTIAL: Final = re.compile(r"[a-z0-9]([a-z0-9_-]{0,62})")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A provider's model. `base_url` empty: the provider's own. `credential` empty: the one named as the provider."""

    provider: str
    name: str
    base_url: str
    credential: str
    temperature: float | None
    max_tokens: int | None
    # Whether the wire is told of the output_schema too, besides the model itself.
    structured: bool
    # Further fields of the request, as the provider names them: JSON values, Any.
    options: Mapping[str, Any]

    @property
    def title(self) -> str:
        """`provider/name`, as events name it."""
        return f"{self.provider}/{self.name}"


def read_endpoints(plan: AgentPlan) -> tuple[Endpoint, ...]:
    """The model and its fallbacks, in their order; SPEC_INVALID."""
    fallbacks = plan.model.get("fallbacks") or []
    if not isinstance(fallbacks, list) or len(fallbacks) > FALLBACKS_MAX:
        raise spec_invalid("model.fallbacks", f"it is not a list of at most {FALLBACKS_MAX} models")
    entries = [("model", plan.model), *((f"model.fallbacks[{index}]", entry) for index, entry in enumerate(fallbacks))]
    return tuple(_read_endpoint(entry, field) for field, entry in entries)


def read_window(plan: AgentPlan) -> Window:
    """How much of the conversation the model is told."""
    context = plan.model.get("context") or {}
    return Window(int(context.get("max_tokens", TOKENS_DEFAULT)), int(context.get("keep_last", KEEP_LAST_DEFAULT)))


def _read_endpoint(entry: Mapping[str, Any], field: str) -> Endpoint:
    """Any: JSON values, which the registry has checked."""
    provider, name, credential = entry.get("provider"), entry.get("name"), entry.get("credential") or ""
    if provider not in PROVIDERS:
        raise spec_invalid(f"{field}.provider", f"{provider!r} is not one of: {', '.join(PROVIDERS)}")
    if not isinstance(name, str) or not name:
        raise spec_invalid(f"{field}.name", "it is required")
    if credential and not _CREDENTIAL.fullmatch(credential):
        raise spec_invalid(f"{field}.credential", "a name has lower-case letters, digits, dashes and underscores")
    return Endpoint(
        provider=provider,
        name=name,
        base_url=str(entry.get("base_url") or "").rstrip("/"),
        credential=credential,
        temperature=entry.get("temperature"),
        max_tokens=entry.get("max_tokens"),
        structured=bool(entry.get("structured", False)),
        options=entry.get("options") or {},
    )
