"""The process that runs tools: it attaches to every dispatcher, takes calls, returns outcomes."""

from mainspring.worker.loading import load_tools
from mainspring.worker.serving import Worker, new_loop, run

__all__ = ["Worker", "load_tools", "new_loop", "run"]
