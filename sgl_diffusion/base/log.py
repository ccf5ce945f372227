"""Logging: one line per event, to stderr, with control characters escaped.

People at a terminal get text, everything else gets one JSON object a line; SGLD_LOG_FORMAT decides
otherwise. `log.info("request", extra={"fields": {...}})` adds fields to an event.
"""

from __future__ import annotations

import json
import logging
import sys
import time

from sgl_diffusion.base import env
from sgl_diffusion.base.errors import ConfigError

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class _OneLine(logging.Formatter):
    """A record never breaks the line, whatever a client put into it; the lines of a traceback
    cannot be taken for records."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"{self.formatTime(record, '%H:%M:%S')} {record.levelname[0]} {record.name}"
        fields = getattr(record, "fields", {})
        rest = "".join(f" {name}={value}" for name, value in fields.items() if value is not None)
        lines = [f"{head}: {_escape(record.getMessage() + rest)}"]
        if record.exc_info:
            trace = self.formatException(record.exc_info).split("\n")
            lines += [f"    | {_escape(line)}" for line in trace]
        return "\n".join(lines)


class _Json(logging.Formatter):
    """One object a record; JSON itself escapes what could break the line."""

    def format(self, record: logging.LogRecord) -> str:
        event = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            event["traceback"] = self.formatException(record.exc_info)
        return json.dumps(event, default=str)


def _formatter() -> logging.Formatter:
    wanted = env.get("SGLD_LOG_FORMAT")
    if wanted not in ("", "text", "json"):
        raise ConfigError(f"There is no log format {wanted!r}.", hint="Use text or json.")
    text = wanted == "text" or (not wanted and sys.stderr.isatty())
    return _OneLine() if text else _Json()


def _escape(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def get_logger(name: str) -> logging.Logger:
    """The logger of a room: `get_logger(__name__)`."""
    return logging.getLogger(name)


def set_up(level: str) -> None:
    """Give the package's logger its handler and level, and what libraries warn of the same form; a
    second call only sets the level."""
    level = level.lower()
    if level not in _LEVELS:
        raise ConfigError(
            f"There is no log level {level!r}.", hint=f"Use one of {', '.join(_LEVELS)}."
        )
    root = logging.getLogger("sgl_diffusion")
    root.setLevel(_LEVELS[level])
    root.propagate = False
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_formatter())
        root.addHandler(handler)
        logging.getLogger().addHandler(handler)
