"""Runs, sessions, agents and tools as JSON objects. What is not yet known of one is left out."""

from __future__ import annotations

import orjson
from mainspring.v1 import execution_pb2, registry_pb2, state_pb2, types_pb2

from mainspring_gateway.core.events import (
    Data,
    approval_kind,
    decision_text,
    encode,
    error_data,
    leaf,
    stages_data,
    time_text,
    usage_data,
)


def state_text(state: int) -> str:
    """A run's state by its name, as RUNNING."""
    return types_pb2.RunState.Name(types_pb2.RunState.ValueType(state)).removeprefix("RUN_STATE_")


def run_data(run: types_pb2.Run) -> Data:
    """A run."""
    data: Data = {
        "run_id": run.run_id,
        "user_id": run.user_id,
        "session_id": run.session_id,
        "ordinal": run.ordinal,
        "agent": run.agent,
        "agent_version": run.agent_version,
        "state": state_text(run.state),
        "last_seq": run.last_seq,
        "input": leaf(run.input),
        "trace_id": run.trace_id,
        "root_run_id": run.root_run_id or run.run_id,
    }
    if run.result:
        data["result"] = leaf(run.result)
    if run.HasField("error"):
        data["error"] = error_data(run.error)
    if run.HasField("usage"):
        data["usage"] = usage_data(run.usage)
    if run.stages:
        data["stages"] = stages_data(run.stages)
    for field in ("parent_run_id", "source_run_id", "depth", "attempt", "priority"):
        if value := getattr(run, field):
            data[field] = value
    for name in ("create_time", "start_time", "end_time", "released_time", "deadline"):
        if run.HasField(name):
            data[name] = time_text(getattr(run, name))
    return data


def runs_page(page: state_pb2.ListRunsResponse) -> bytes:
    """A page of runs, newest first."""
    return orjson.dumps({"runs": [run_data(run) for run in page.runs], "next_page_token": page.next_page_token})


def explanation(answer: execution_pb2.ExplainRunResponse) -> bytes:
    """A run, why it does not go on, and who holds it."""
    holds = [hold_data(hold) for hold in answer.holds]
    return orjson.dumps({"run": run_data(answer.run), "holds": holds, "executor_id": answer.executor_id})


def hold_data(hold: types_pb2.Hold) -> Data:
    """One reason why a run does not go on, or what it is doing."""
    data: Data = {
        "kind": types_pb2.HoldKind.Name(hold.kind).removeprefix("HOLD_KIND_").lower(),
        "detail": hold.detail,
    }
    if hold.run_ids:
        data["run_ids"] = list(hold.run_ids)
    if hold.HasField("until"):
        data["until"] = time_text(hold.until)
    for field in ("approval_id", "cap", "limit", "call_id", "position"):
        if value := getattr(hold, field):
            data[field] = value
    return data


def approval_data(approval: types_pb2.Approval) -> Data:
    """A question to a person, and what became of it."""
    data: Data = {
        "approval_id": approval.approval_id,
        "run_id": approval.run_id,
        "user_id": approval.user_id,
        "session_id": approval.session_id,
        "agent": approval.agent,
        "kind": approval_kind(approval.kind),
        "title": approval.title,
        "arguments": leaf(approval.arguments),
        "answer_schema": leaf(approval.answer_schema),
        "role": approval.role,
        "decision": decision_text(approval.decision),
    }
    for name in ("create_time", "expires_time", "resolve_time"):
        if approval.HasField(name):
            data[name] = time_text(getattr(approval, name))
    if approval.decision:
        data |= {"data": leaf(approval.data), "answered_by": approval.answered_by}
    return data


def approvals_page(page: state_pb2.ListApprovalsResponse) -> bytes:
    """A page of approvals, newest first."""
    approvals = [approval_data(approval) for approval in page.approvals]
    return orjson.dumps({"approvals": approvals, "next_page_token": page.next_page_token})


def metrics_page(page: state_pb2.ListRunMetricsResponse) -> bytes:
    """A page of what runs cost, newest first."""
    metrics = [_metrics_data(row) for row in page.metrics]
    return orjson.dumps({"metrics": metrics, "next_page_token": page.next_page_token})


def _metrics_data(row: types_pb2.RunMetrics) -> Data:
    return {
        "run_id": row.run_id,
        "user_id": row.user_id,
        "agent": row.agent,
        "agent_version": row.agent_version,
        "state": state_text(row.state),
        "error_reason": row.error_reason,
        "end_time": time_text(row.end_time),
        "duration_ms": row.duration_ms,
        "queue_ms": row.queue_ms,
        "waiting_ms": row.waiting_ms,
        "stages": stages_data(row.stages),
        "model_calls": row.model_calls,
        "tool_calls": row.tool_calls,
        "tool_errors": row.tool_errors,
        "cache_hits": row.cache_hits,
        "retries": row.retries,
        "recoveries": row.recoveries,
        "usage": usage_data(row.usage),
        "trace_id": row.trace_id,
    }


def events_page(page: state_pb2.ReadEventsResponse) -> bytes:
    """A page of a run's events, each as the socket shows it."""
    events = [orjson.Fragment(encode(event).payload) for event in page.events]
    return orjson.dumps({"events": events, "last_seq": page.last_seq})


def sessions_page(page: state_pb2.ListSessionsResponse) -> bytes:
    """A page of sessions, newest first."""
    sessions = [
        {
            "session_id": session.session_id,
            "policy": types_pb2.SessionPolicy.Name(session.policy).removeprefix("SESSION_POLICY_").lower(),
            "title": session.title,
            "create_time": time_text(session.create_time),
            "update_time": time_text(session.update_time),
            "run_count": session.run_count,
        }
        for session in page.sessions
    ]
    return orjson.dumps({"sessions": sessions, "next_page_token": page.next_page_token})


def agent_data(agent: types_pb2.Agent) -> Data:
    """A version of an agent, with its whole specification."""
    return {
        "name": agent.name,
        "version": agent.version,
        "description": agent.description,
        "labels": dict(agent.labels),
        "capabilities": list(agent.capabilities),
        "spec": leaf(agent.spec),
        "create_time": time_text(agent.create_time),
    }


def agents_page(page: registry_pb2.ListAgentsResponse) -> bytes:
    """A page of agents by name."""
    return orjson.dumps(
        {"agents": [agent_data(agent) for agent in page.agents], "next_page_token": page.next_page_token}
    )


def schedule_data(schedule: registry_pb2.Schedule) -> Data:
    """A schedule."""
    data: Data = {
        "name": schedule.name,
        "cron": schedule.cron,
        "time_zone": schedule.time_zone or "UTC",
        "agent": schedule.agent,
        "alias": schedule.alias or "stable",
        "input": leaf(schedule.input),
        "user_id": schedule.user_id,
        "missed": registry_pb2.MissedPolicy.Name(schedule.missed).removeprefix("MISSED_POLICY_").lower(),
        "overlap": types_pb2.SessionPolicy.Name(schedule.overlap).removeprefix("SESSION_POLICY_").lower(),
        "paused": schedule.paused,
    }
    if schedule.last_run_id:
        data["last_run_id"] = schedule.last_run_id
    if schedule.HasField("last_error"):
        data["last_error"] = error_data(schedule.last_error)
    for name in ("create_time", "next_time", "last_time"):
        if schedule.HasField(name):
            data[name] = time_text(getattr(schedule, name))
    return data


def schedules_page(page: registry_pb2.ListSchedulesResponse) -> bytes:
    """A page of schedules by name."""
    schedules = [schedule_data(schedule) for schedule in page.schedules]
    return orjson.dumps({"schedules": schedules, "next_page_token": page.next_page_token})


def tools_page(page: registry_pb2.ListToolsResponse) -> bytes:
    """A page of tools by name."""
    tools = []
    for tool in page.tools:
        data: Data = {
            "name": tool.name,
            "version": tool.version,
            "description": tool.description,
            "input_schema": leaf(tool.input_schema),
            "effect": types_pb2.EffectClass.Name(tool.effect).removeprefix("EFFECT_CLASS_").lower(),
            "shared": tool.shared,
        }
        if tool.HasField("timeout"):
            data["timeout_seconds"] = tool.timeout.ToMilliseconds() / 1e3
        tools.append(data)
    return orjson.dumps({"tools": tools, "next_page_token": page.next_page_token})
