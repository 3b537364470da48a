"""The process that runs tools: it attaches to every dispatcher, takes calls, returns outcomes."""

from mainspring.worker.loading import load_tools
from mainspring.worker.serving import Worker, run

__all__ = ["Worker", "load_tools", "run"]
