"""The adapters that a worker knows and has in use, kept in a file for the worker after it."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec

from sgl_diffusion.base.errors import EngineError, SetupError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.engine.lora.fit import Source

log = get_logger(__name__)

Mode = Literal["merged", "dynamic"]


@dataclass(frozen=True)
class Chosen:
    """The set of one component: adapters with strengths, merged or applied row by row; `on` until
    it is unmerged."""

    uses: tuple[tuple[Source, float], ...]
    mode: Mode
    on: bool = True

    def switched(self, on: bool, strength: float | None = None) -> Chosen:
        if strength is None:
            return replace(self, on=on)
        return replace(self, on=on, uses=tuple((source, strength) for source, _ in self.uses))


Sets = dict[str, Chosen]  # by component


@dataclass
class Known:
    """What a worker starts from: every adapter by its nickname, and the set of each component."""

    model: str
    sources: dict[str, Source] = field(default_factory=dict)
    sets: Sets = field(default_factory=dict)


class StateFile:
    """Without a path nothing is kept."""

    def __init__(self, path: Path | None, model: str) -> None:
        self._path = path
        self._model = model

    def read(self) -> Known | None:
        """What the worker before this one left for the same model."""
        if self._path is None or not self._path.is_file():
            return None
        try:
            known = msgspec.json.decode(self._path.read_bytes(), type=Known)
        except (OSError, msgspec.MsgspecError):
            raise SetupError(
                f"{self._path}, which says what adapters are in use, cannot be read.",
                hint="Delete it to start without adapters.",
            ) from None
        if known.model != self._model:
            log.info("%s is about the adapters of another model", self._path)
            return None
        return known

    def write(self, sources: dict[str, Source], sets: Sets) -> None:
        if self._path is None:
            return
        data = msgspec.json.encode(Known(self._model, sources, sets))
        try:
            self._replace(self._path, data)
        except OSError as error:
            raise EngineError(
                f"The adapters in use cannot be written down: {error.strerror}.",
                hint="Nothing was changed. Make room in the data folder.",
                code="insufficient_storage",
            ) from None

    @staticmethod
    def _replace(path: Path, data: bytes) -> None:
        """Whole or not at all, also when the machine stops."""
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}-", delete=False
        ) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)

    def lost(self, error: Exception) -> SetupError:
        return SetupError(
            f"The adapters that were in use cannot be loaded again: {error}",
            hint=f"Delete {self._path} to start without adapters.",
        )
