"""The Model of an agent with a real provider: puts the question together, asks, and says what the answer means."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson
from mainspring_kit.errors import MainspringError

from mainspring_execution.core.conversation import compose
from mainspring_execution.core.plan import AgentPlan, spec_invalid
from mainspring_execution.core.thought import Thought, Turn
from mainspring_execution.models import anthropic, openai
from mainspring_execution.models.answer import Draft, Question, check_end, conclude
from mainspring_execution.models.clients import Clients
from mainspring_execution.models.credentials import Credentials
from mainspring_execution.models.endpoint import REPAIRS_DEFAULT, Endpoint, read_endpoints, read_window
from mainspring_execution.models.faults import translate
from mainspring_execution.models.prices import Prices

ANY_ADDRESS: Final = "*"
# What a local server that asks for no key is told.
NO_KEY: Final = "none"

_PROVIDERS: Final = {"openai": openai, "anthropic": anthropic}
# What stands behind a wrong chunk: members that are missing, of another type, or no JSON.
_UNREADABLE: Final = (AttributeError, IndexError, KeyError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Shop:
    """What all models of the process share. `addresses`: those that a `base_url` may name, or `*`."""

    clients: Clients
    credentials: Credentials
    prices: Prices
    addresses: Collection[str]

    async def aclose(self) -> None:
        """Closes every connection."""
        await self.clients.close()


class ConversingModel:
    """Answers with a provider's model, or with one of its fallbacks once a turn says so."""

    needs_history = True
    needs_tools = True
    repairs = REPAIRS_DEFAULT

    def __init__(self, plan: AgentPlan, shop: Shop) -> None:
        self._endpoints = read_endpoints(plan)
        self._window = read_window(plan)
        self._schema = None if plan.output_schema is None else plan.output_schema.document
        self._instructions = _instruct(plan.instructions, self._schema)
        self._shop = shop
        for endpoint in self._endpoints:
            _check_address(endpoint, shop.addresses)

    @property
    def fallbacks(self) -> int:
        """How many other models there are to ask when the first one cannot answer."""
        return len(self._endpoints) - 1

    def rank(self, name: str) -> int:
        """Which of the models has this name; 0 for others."""
        titles = [endpoint.title for endpoint in self._endpoints]
        return titles.index(name) if name in titles else 0

    def waits(self, step: int) -> bool:
        """Always."""
        return True

    async def think(self, turn: Turn, emit: Callable[[str], None]) -> Thought:
        """Answers one step; CREDENTIAL_MISSING, MODEL_FAILED."""
        endpoint = self._endpoints[min(turn.fallback, self.fallbacks)]
        question = Question(
            self._instructions,
            compose(turn, self._window, instructions=self._instructions),
            turn.tools,
            self._schema,
        )
        draft = await self._ask(endpoint, question, turn=turn, emit=emit)
        usage = self._shop.prices.usage(endpoint.provider, endpoint.name, tokens=draft.tokens)
        check_end(draft, endpoint, step=turn.step)
        try:
            calls, result = conclude(
                draft, tools=[tool.name for tool in turn.tools], wants_json=self._schema is not None
            )
        except MainspringError as fault:
            return Thought(endpoint.title, draft.text, usage, fault=fault)
        return Thought(endpoint.title, draft.text, usage, calls, result, draft.state)

    async def _ask(self, endpoint: Endpoint, question: Question, *, turn: Turn, emit: Callable[[str], None]) -> Draft:
        key = self._find_key(endpoint, tenant_id=turn.tenant_id)
        provider = _PROVIDERS[endpoint.provider]
        request = provider.make_request(endpoint, question)
        async with self._shop.clients.use(endpoint, key) as (client, sdk):
            import httpx2  # comes with the SDKs, which need not be there

            try:
                draft: Draft = await provider.ask(client, request, emit=emit)
            except (sdk.APIError, httpx2.RequestError, *_UNREADABLE) as error:
                raise translate(error, sdk, endpoint=endpoint, step=turn.step, key=key) from error
        return draft

    def _find_key(self, endpoint: Endpoint, *, tenant_id: str) -> str:
        name = endpoint.credential or endpoint.provider
        if key := self._shop.credentials.find(name, tenant_id=tenant_id):
            return key
        if endpoint.base_url and not endpoint.credential:
            return NO_KEY
        raise self._shop.credentials.missing(name)


def _instruct(instructions: str, schema: Mapping[str, Any] | None) -> str:
    """The agent's instructions, and what its answer has to be. Any: JSON values."""
    if schema is None:
        return instructions
    asked = f"Your last answer must be one JSON value and nothing else; it must match this JSON Schema: {_dump(schema)}"
    return f"{instructions}\n\n{asked}".strip()


def _dump(schema: Mapping[str, Any]) -> str:
    """Any: JSON values."""
    return orjson.dumps(schema).decode()


def _check_address(endpoint: Endpoint, addresses: Collection[str]) -> None:
    """SPEC_INVALID where a specification would have the service call, and give its keys to, whomever it likes."""
    if endpoint.base_url and endpoint.base_url not in addresses and ANY_ADDRESS not in addresses:
        fault = (
            f"{endpoint.base_url} is not one of the addresses that this platform asks models at; its operator lists "
            "them in MAINSPRING_MODEL_BASE_URLS"
        )
        raise spec_invalid("model.base_url", fault)
