"""W1's look-up as Aegra loads it; it adds its own place for checkpoints."""

from __future__ import annotations

from benchmarks.peers.langgraph.graph import build

graph = build().compile()
