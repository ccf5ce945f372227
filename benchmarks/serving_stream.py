"""What a stream of pictures says on its way: the lines of server-sent events and of comments."""

from __future__ import annotations

import json
from dataclasses import dataclass

_DATA, _COMMENT, _ERROR = "data: ", ": ", "event: error"


@dataclass
class Told:
    """The seconds at which it had `begun` and showed its first `preview`; `done` pictures."""

    begun: float | None = None
    preview: float | None = None
    done: int = 0
    error: bool = False

    def line(self, line: str, now: float) -> None:
        """One more line, which came `now`."""
        if line.startswith(_DATA):
            kind = json.loads(line.removeprefix(_DATA)).get("type", "")
            if kind.endswith(".partial_image") and self.preview is None:
                self.preview = now
            self.done += kind.endswith(".completed")
            self._begin(now)
        elif line.startswith(_COMMENT + "{"):
            if "step" in json.loads(line.removeprefix(_COMMENT)):
                self._begin(now)
        elif line.startswith(_ERROR):
            self.error = True

    def _begin(self, now: float) -> None:
        if self.begun is None:
            self.begun = now
