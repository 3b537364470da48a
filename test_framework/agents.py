"""Agents that tests register: specifications for the scripted model provider, as plain values."""

from __future__ import annotations

from typing import Any

Spec = dict[str, Any]  # Any: a JSON document


def scripted_agent(name: str, *steps: Spec, **more: Any) -> Spec:
    """An agent that follows a script; the last of its steps should have a `result`. It may call the tools it names."""
    tools = sorted({planned["tool"] for entry in steps for planned in entry.get("calls", [])})
    return {
        "apiVersion": "mainspring/v1",
        "kind": "Agent",
        "name": name,
        "description": f"Test agent {name}.",
        "model": {"provider": "scripted", "script": list(steps)},
        "tools": tools,
        **more,
    }


def step(text: str, *calls: Spec, **more: Any) -> Spec:
    """One model step: what it says, the tools it calls, and `result`, `delay` or `fail` where given."""
    return {"text": text, **({"calls": list(calls)} if calls else {}), **more}


def call(tool: str, **arguments: Any) -> Spec:
    """One tool call of a step."""
    return {"tool": tool, "arguments": arguments}


def echo_agent(name: str = "echo") -> Spec:
    """Two steps around one pure tool: its result is `{"answer": <input.value>}`."""
    return scripted_agent(
        name,
        step("I will echo the value.", call("diagnostics.echo", value="{{input.value}}")),
        step("Done.", result={"answer": "{{calls[0].result.value}}"}),
    )
