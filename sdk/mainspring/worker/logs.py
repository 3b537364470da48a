"""The worker's log: JSON lines on standard error, as the services write them, with the libraries' and tools' own."""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime
from typing import Final

import orjson

_logger: Final = logging.getLogger("mainspring.worker")


def note(level: int, event: str, *, error: BaseException | None = None, **fields: object) -> None:
    """One line: `noun_verb`, ids as fields; the error comes with its traceback."""
    _logger.log(level, event, extra={"fields": fields}, exc_info=error)


def configure() -> None:
    """Sends everything logged in the process to standard error, unless the process has arranged its logs already."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines())
    logging.basicConfig(handlers=[handler], level=os.environ.get("MAINSPRING_LOG_LEVEL", "info").upper())


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "event": record.getMessage(),
            "level": record.levelname.lower(),
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "service": "worker",
            **getattr(record, "fields", {"logger": record.name}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()
