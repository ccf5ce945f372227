"""Logging: one line per event, to stderr, with control characters escaped."""

from __future__ import annotations

import logging
import sys

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
        lines = [f"{head}: {_escape(record.getMessage())}"]
        if record.exc_info:
            trace = self.formatException(record.exc_info).split("\n")
            lines += [f"    | {_escape(line)}" for line in trace]
        return "\n".join(lines)


def _escape(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def get_logger(name: str) -> logging.Logger:
    """The logger of a room: `get_logger(__name__)`."""
    return logging.getLogger(name)


def set_up(level: str) -> None:
    """Give the package's logger its handler and level; a second call only sets the level."""
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
        handler.setFormatter(_OneLine())
        root.addHandler(handler)
