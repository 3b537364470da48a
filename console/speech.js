// The unfinished text of model steps, put together from deltas. Offsets count characters, not the UTF-16 units of strings.

// After these no text of an earlier step can follow; agent_thinking ends its own step's alone.
const ENDS = new Set([
  "agent_completed", "agent_failed", "agent_cancelled", "agent_timed_out",
  "agent_paused", "agent_waiting", "run_recovered",
]);

export class Speech {
  constructor() { this.clear(); }

  clear() { Object.assign(this, { runId: "", step: 0, text: "", length: 0 }); }

  // Takes a delta; false where what comes before it is not here.
  take(delta) {
    const goesOn = delta.run_id === this.runId && delta.step === this.step;
    if (!goesOn || delta.offset === 0) {
      if (delta.offset !== 0) return false;
      Object.assign(this, { runId: delta.run_id, step: delta.step, text: "", length: 0 });
    }
    if (delta.offset > this.length) return false;
    const kept = delta.offset === this.length ? this.text : [...this.text].slice(0, delta.offset).join("");
    this.text = kept + delta.text;
    this.length = delta.offset + [...delta.text].length;
    return true;
  }

  // Gives the text up where an event tells its end.
  endWith({ run_id: runId, type, data }) {
    const isOver = ENDS.has(type) || (type === "agent_thinking" && data.step >= this.step);
    if (runId === this.runId && isOver) this.clear();
  }
}
