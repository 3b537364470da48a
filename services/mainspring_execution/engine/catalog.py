"""Execution's copy of the catalog: which version a name means, what effect a tool has. Never trusted once stale."""

from __future__ import annotations

import asyncio
import random
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import grpc
from mainspring.v1 import registry_pb2, types_pb2
from mainspring_kit import telemetry
from mainspring_kit.errors import MainspringError, Reason
from mainspring_kit.identity import UserExecutionContext
from mainspring_kit.tasks import raise_if_cancelled

from mainspring_execution.core.intrinsic import describe, is_intrinsic
from mainspring_execution.core.plan import AgentPlan, read_plan
from mainspring_execution.models import Model, make_model
from mainspring_execution.models.conversing import Shop
from mainspring_execution.peers import Registry

STALE_SECONDS: Final = 1.0
AGENTS_MAX: Final = 100_000
TOOLS_MAX: Final = 100_000
PREPARED_MAX: Final = 4_096
RECONNECT_SECONDS_MIN: Final = 0.05
RECONNECT_SECONDS_MAX: Final = 1.0
NO_LIMITS: Final = registry_pb2.TenantLimits()
# The registry beats four times a second.
SILENT_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class PreparedAgent:
    """A version of an agent, compiled."""

    plan: AgentPlan
    model: Model


class Catalog:
    """The copy, kept by `watch`; asks the registry where the copy cannot answer."""

    def __init__(self, registry: Registry, shop: Shop) -> None:
        """`shop`: what the models of all agents share."""
        self._registry = registry
        self._shop = shop
        self._newest: dict[tuple[str, str], types_pb2.Agent] = {}
        self._tools: dict[tuple[str, str], types_pb2.Tool] = {}
        self._limits: dict[str, registry_pb2.TenantLimits] = {}
        self._prepared: OrderedDict[tuple[str, str, str], PreparedAgent] = OrderedDict()
        self._revision = 0
        self._heard_time = float("-inf")

    @property
    def is_fresh(self) -> bool:
        """Whether the copy is whole and at most a second old."""
        return self._revision > 0 and time.monotonic() - self._heard_time < STALE_SECONDS

    async def watch(self) -> None:
        """Keeps the copy up to date, as long as it is awaited."""
        delay = RECONNECT_SECONDS_MIN
        while True:
            call = self._registry.watch(self._revision)
            try:
                while True:
                    async with asyncio.timeout(SILENT_SECONDS):
                        change = await call.read()
                    if not isinstance(change, registry_pb2.WatchCatalogResponse):
                        break
                    self.apply(change)
                    delay = RECONNECT_SECONDS_MIN
            except TimeoutError:
                telemetry.logger().warning("catalog_silent", seconds=SILENT_SECONDS)
            except grpc.aio.AioRpcError as error:
                telemetry.logger().warning("catalog_lost", code=error.code().name)
            finally:
                call.cancel()
            raise_if_cancelled()
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(delay * 2, RECONNECT_SECONDS_MAX)

    def apply(self, change: registry_pb2.WatchCatalogResponse) -> None:
        """Takes a frame of the watch."""
        for agent in change.agents:
            self._apply_agent(agent)
        for tool in change.tools:
            self._keep(tool.tenant_id, tool.tool)
        for entry in change.tenants:
            self._limits[entry.tenant.tenant_id] = registry_pb2.TenantLimits() if entry.deleted else entry.tenant.limits
        self._revision = change.revision or self._revision
        self._heard_time = time.monotonic()

    async def resolve(
        self, context: UserExecutionContext, name: str, *, alias: str = "", version: str = ""
    ) -> PreparedAgent:
        """The version that a new run gets; AGENT_NOT_FOUND, VERSION_NOT_FOUND, SPEC_INVALID.

        A name that the copy does not know is asked for too: it may have been registered just now.
        """
        newest = self._newest.get((context.tenant_id, name)) if self.is_fresh else None
        if newest is not None and (version == newest.version if version else alias in ("", "stable")):
            return self._prepare(context.tenant_id, newest)
        agent = await self._registry.resolve(context, name, alias=alias, version=version)
        return self._prepare(context.tenant_id, agent)

    async def recall(self, context: UserExecutionContext, name: str, *, version: str) -> PreparedAgent:
        """The version that a run has begun with, which may no longer be what new runs get."""
        prepared = self._prepared.get((context.tenant_id, name, version))
        return prepared or await self.resolve(context, name, version=version)

    async def limits_of(self, context: UserExecutionContext) -> registry_pb2.TenantLimits:
        """What the runs of the context's tenant may take; once known, a stale copy is as good as any."""
        if self._revision:
            return self._limits.get(context.tenant_id, NO_LIMITS)
        try:
            return await self._registry.get_limits(context)
        except MainspringError as error:
            if error.reason_name != Reason.TENANT_NOT_FOUND.name:
                raise
            return NO_LIMITS

    def lacks(self, tools: Iterable[str], *, tenant_id: str) -> bool:
        """Whether the copy does not know a tool: it is not whole yet, or the tool was registered just now."""
        return any((tenant_id, tool) not in self._tools and ("", tool) not in self._tools for tool in tools)

    async def learn_tools(self, context: UserExecutionContext) -> bool:
        """Asks for the tenant's tools, for one that the copy lacks. Always true."""
        for tool in await self._registry.list_tools(context):
            self._keep("" if tool.shared else context.tenant_id, tool)
        return True

    def effect_of(self, tool: str, *, tenant_id: str) -> types_pb2.EffectClass.ValueType:
        """What a second call of a tool would do; an unknown tool is taken for unsafe."""
        known = self.tool(tool, tenant_id=tenant_id)
        return known.effect if known is not None else types_pb2.EFFECT_CLASS_UNSAFE

    def tool(self, name: str, *, tenant_id: str) -> types_pb2.Tool | None:
        """A tool as its worker declared it: the tenant's own, or the one that all may call."""
        return self._tools.get((tenant_id, name)) or self._tools.get(("", name))

    def offer(self, tools: Iterable[str], *, tenant_id: str) -> list[types_pb2.Tool]:
        """What a model is told of the tools that it may call, in the order of their names."""
        return [tool for name in sorted(tools) if (tool := self._describe(name, tenant_id=tenant_id)) is not None]

    def _describe(self, name: str, *, tenant_id: str) -> types_pb2.Tool | None:
        if not is_intrinsic(name):
            return self.tool(name, tenant_id=tenant_id)
        agent = self._newest.get((tenant_id, name.partition(".")[2]))
        return describe(name, description=agent.description if agent is not None else "")

    def _keep(self, tenant_id: str, tool: types_pb2.Tool) -> None:
        key = (tenant_id, tool.name)
        if len(self._tools) < TOOLS_MAX or key in self._tools:
            self._tools[key] = tool

    def _apply_agent(self, entry: registry_pb2.CatalogAgent) -> None:
        key = (entry.tenant_id, entry.agent.name)
        known = self._newest.get(key)
        if entry.deleted:
            self._newest.pop(key, None)
        elif known is None and len(self._newest) >= AGENTS_MAX:
            return
        elif known is None or int(entry.agent.version) >= int(known.version):
            self._newest[key] = entry.agent

    def _prepare(self, tenant_id: str, agent: types_pb2.Agent) -> PreparedAgent:
        key = (tenant_id, agent.name, agent.version)
        prepared = self._prepared.get(key)
        if prepared is None:
            plan = read_plan(agent)
            prepared = self._prepared[key] = PreparedAgent(plan, make_model(plan, self._shop))
            if len(self._prepared) > PREPARED_MAX:
                self._prepared.popitem(last=False)
        return prepared
