"""The README's help desk, done as it says: a model's words as they come, a person's answer, a colleague who goes on."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from examples.help_desk.model import decide, outcomes
from examples.help_desk.tools import ORDERS
from tests.flow.dev_command import environment

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(180)


def command() -> list[str]:
    """The line of the README that runs the example."""
    (line,) = re.findall(r"^python (examples/help_desk/run\.py[^#\n]*)", (ROOT / "README.md").read_text(), re.MULTILINE)
    return [sys.executable, *shlex.split(line)]


def test_the_readmes_help_desk_asks_streams_and_hands_over() -> None:
    # As on a terminal: only there words are shown as they come.
    variables = {**environment(), "FORCE_COLOR": "1", "COLUMNS": "200"}
    done = subprocess.run(command(), cwd=ROOT, env=variables, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    shown = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    types = re.findall(r"^ +\d+\.\d{3} s  (\w+)", shown, re.MULTILINE)
    assert [name for name in types if name.startswith(("agent_handed", "approval_", "agent_completed"))] == [
        "agent_handed_off",
        "approval_requested",
        "approval_resolved",
        "agent_completed",
    ]
    assert "Give 49.90 EUR back for order 1002?" in shown
    assert shown.rstrip().endswith("49.90 EUR for your desk lamp are on their way back to you.")
    # What was streamed stands between the events; an event that comes in between breaks its line.
    streamed = " ".join(re.sub(r"^ +\d+\.\d{3} s  .*$", "", shown, flags=re.MULTILINE).split())
    assert "Let me look your order up." in streamed
    assert "Before I give money back I ask a person." in streamed


def test_the_stand_in_gives_no_money_back_after_a_no() -> None:
    order = '{"order": "1002", "article": "desk lamp", "amount_eur": 49.9}'
    refusal = '{"error": {"code": "PERMISSION_DENIED", "reason": "APPROVAL_DENIED", "message": "No."}}'
    messages = [{"role": "user", "content": "Money back for 1002!"}]
    for number, (name, result) in enumerate({"desk__find-order": order, "human__approve": refusal}.items()):
        function = {"name": name, "arguments": "{}"}
        messages.append({"role": "assistant", "tool_calls": [{"id": f"c{number}", "function": function}]})  # type: ignore[dict-item]  # as on the wire
        messages.append({"role": "tool", "tool_call_id": f"c{number}", "content": result})
    said, calls = decide(messages, {"desk__refund", "human__approve"})
    assert (calls, "decided against" in said) == ([], True)
    assert outcomes(messages)["desk__find-order"]["amount_eur"] == ORDERS["1002"]["amount_eur"]
