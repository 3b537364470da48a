"""The whole platform on one machine: what `mainspring dev`, tests and benchmarks start.

async with mainspring.dev.stack(replicas={"state": 2}) as stack:
    await stack.kill("state", index=0)
    await stack.wait_ready()
"""

from mainspring.dev.running import Stack
from mainspring.dev.start import stack
from mainspring.embedded.launch import StartError

__all__ = ["Stack", "StartError", "stack"]
