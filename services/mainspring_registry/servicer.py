"""The registry as the wire sees it: mainspring.v1.RegistryService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime

from jsonschema import Draft202012Validator
from mainspring.v1 import registry_pb2 as pb
from mainspring.v1 import registry_pb2_grpc as rpc
from mainspring_kit.identity import UserExecutionContext, caller_variable, current_context
from mainspring_kit.interceptors import ServicerContext

from mainspring_registry.core import catalog
from mainspring_registry.core.schedules import read_name, read_schedule, timetable
from mainspring_registry.core.spec import read_agent
from mainspring_registry.core.tenants import read_tenant_id
from mainspring_registry.core.tools import read_tools
from mainspring_registry.engine import CatalogWatch
from mainspring_registry.store.catalog import Store
from mainspring_registry.store.schedules import Schedules


@dataclass(frozen=True, slots=True)
class Schemas:
    """The published schemas of what is registered as a document."""

    agent: Draft202012Validator
    schedule: Draft202012Validator


class RegistryServicer(rpc.RegistryServiceServicer):
    """Unpacks, calls, packs. The rpcs that it lacks are of later releases and answer so."""

    def __init__(self, store: Store, schedules: Schedules, *, watch: CatalogWatch, schemas: Schemas) -> None:
        self._store = store
        self._schedules = schedules
        self._watch = watch
        self._schemas = schemas

    async def RegisterAgent(
        self, request: pb.RegisterAgentRequest, context: ServicerContext
    ) -> pb.RegisterAgentResponse:
        """See registry.proto."""
        user = current_context()
        # In a thread: a large document takes long enough to hold up every stream of the process.
        agent = await asyncio.to_thread(read_agent, request.document, self._schemas.agent)
        stored, created = await self._store.register_agent(user, agent)
        return pb.RegisterAgentResponse(agent=stored, created=created)

    async def GetAgent(self, request: pb.GetAgentRequest, context: ServicerContext) -> pb.GetAgentResponse:
        """See registry.proto."""
        name = catalog.read_name(request.name)
        version = catalog.read_version(name, request.version)
        return pb.GetAgentResponse(agent=await self._store.get_agent(current_context(), name, version=version))

    async def ListAgents(self, request: pb.ListAgentsRequest, context: ServicerContext) -> pb.ListAgentsResponse:
        """See registry.proto."""
        agents, token = await self._store.list_agents(current_context(), catalog.read_filters(request))
        return pb.ListAgentsResponse(agents=agents, next_page_token=token)

    async def ListVersions(self, request: pb.ListVersionsRequest, context: ServicerContext) -> pb.ListVersionsResponse:
        """See registry.proto."""
        catalog.read_name(request.name)
        agents, token = await self._store.list_versions(current_context(), request)
        return pb.ListVersionsResponse(agents=agents, next_page_token=token)

    async def ResolveAgent(self, request: pb.ResolveAgentRequest, context: ServicerContext) -> pb.ResolveAgentResponse:
        """See registry.proto."""
        name = catalog.read_name(request.name)
        version = catalog.resolve_version(request)
        return pb.ResolveAgentResponse(agent=await self._store.get_agent(current_context(), name, version=version))

    async def RegisterTools(
        self, request: pb.RegisterToolsRequest, context: ServicerContext
    ) -> pb.RegisterToolsResponse:
        """See registry.proto."""
        user = caller_variable.get().context
        tools = await asyncio.to_thread(read_tools, request.tools, shared=user is None)
        return pb.RegisterToolsResponse(tools=await self._store.register_tools(user, tools))

    async def ListTools(self, request: pb.ListToolsRequest, context: ServicerContext) -> pb.ListToolsResponse:
        """See registry.proto."""
        tools, token = await self._store.list_tools(current_context(), request)
        return pb.ListToolsResponse(tools=tools, next_page_token=token)

    async def PutTenant(self, request: pb.PutTenantRequest, context: ServicerContext) -> pb.PutTenantResponse:
        """See registry.proto."""
        user = _tenant_of(request.tenant_id)
        return pb.PutTenantResponse(tenant=await self._store.put_tenant(user, request.limits))

    async def GetTenant(self, request: pb.GetTenantRequest, context: ServicerContext) -> pb.GetTenantResponse:
        """See registry.proto."""
        user = _tenant_of(request.tenant_id)
        return pb.GetTenantResponse(tenant=await self._store.get_tenant(user))

    async def ListTenants(self, request: pb.ListTenantsRequest, context: ServicerContext) -> pb.ListTenantsResponse:
        """See registry.proto."""
        tenants, token = await self._store.list_tenants(caller_variable.get().context, request)
        return pb.ListTenantsResponse(tenants=tenants, next_page_token=token)

    async def DeleteTenant(self, request: pb.DeleteTenantRequest, context: ServicerContext) -> pb.DeleteTenantResponse:
        """See registry.proto."""
        await self._store.put_tenant(_tenant_of(request.tenant_id), None)
        return pb.DeleteTenantResponse()

    async def PutSchedule(self, request: pb.PutScheduleRequest, context: ServicerContext) -> pb.PutScheduleResponse:
        """See registry.proto."""
        schedule = await asyncio.to_thread(read_schedule, request.document, self._schemas.schedule)
        next_time = timetable(schedule).after(datetime.now(UTC))
        return pb.PutScheduleResponse(
            schedule=await self._schedules.put(current_context(), schedule, next_time=next_time)
        )

    async def GetSchedule(self, request: pb.GetScheduleRequest, context: ServicerContext) -> pb.GetScheduleResponse:
        """See registry.proto."""
        return pb.GetScheduleResponse(schedule=await self._schedules.get(current_context(), read_name(request.name)))

    async def ListSchedules(
        self, request: pb.ListSchedulesRequest, context: ServicerContext
    ) -> pb.ListSchedulesResponse:
        """See registry.proto."""
        schedules, token = await self._schedules.list_page(current_context(), request)
        return pb.ListSchedulesResponse(schedules=schedules, next_page_token=token)

    async def DeleteSchedule(
        self, request: pb.DeleteScheduleRequest, context: ServicerContext
    ) -> pb.DeleteScheduleResponse:
        """See registry.proto."""
        await self._schedules.delete(current_context(), read_name(request.name))
        return pb.DeleteScheduleResponse()

    async def WatchCatalog(
        self, request: pb.WatchCatalogRequest, context: ServicerContext
    ) -> AsyncIterator[pb.WatchCatalogResponse]:
        """See registry.proto."""
        async for frame in self._watch.frames(request.after_revision):
            yield frame


def _tenant_of(asked: str) -> UserExecutionContext:
    """As whom the limits of the tenant that is asked for are read and written."""
    caller = caller_variable.get()
    own = caller.context.tenant_id if caller.context else ""
    tenant_id = read_tenant_id(asked, own=own, is_service=caller.principal.is_service)
    return UserExecutionContext(tenant_id=tenant_id, user_id=caller.principal.user_id or caller.principal.subject)
