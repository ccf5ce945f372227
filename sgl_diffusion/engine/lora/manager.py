"""The adapters of a running pipeline: which are loaded, which all jobs have, which one job has.

A set is either merged into the weights or, in dynamic mode, applied row by row to every job. While
a set is in use, jobs cannot name adapters of their own. Sets change between jobs only: the
coordinator sees to it that none runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sgl_diffusion.base.errors import ConflictError, NotFoundError, SetupError, SglError
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.base.lora import LoraFile, LoraSetting, LoraUse
from sgl_diffusion.engine.lora.cache import AdapterCache
from sgl_diffusion.engine.lora.checks import check_applicable, check_target, pick_mode, reached
from sgl_diffusion.engine.lora.fit import Fitted, Source, fit, listing
from sgl_diffusion.engine.lora.intake import Intake
from sgl_diffusion.engine.lora.merged import Change, Changes, MergedWeights
from sgl_diffusion.engine.lora.nicknames import latest
from sgl_diffusion.engine.lora.report import describe
from sgl_diffusion.engine.lora.rows import Blend, RowAdapters, Use, blend_key, make_blend
from sgl_diffusion.engine.lora.state import Chosen, Sets, StateFile
from sgl_diffusion.engine.pipeline import Adaptable
from sgl_diffusion.loader.adapters.types import Adapter

log = get_logger(__name__)

ReadFile = Callable[[Source], Adapter]


class Loras:
    """`in_use` gives the blends of the jobs in the worker; their adapters stay loaded."""

    def __init__(
        self,
        components: Mapping[str, Adaptable],
        read: ReadFile,
        *,
        rows: RowAdapters,
        budget: int,
        state: StateFile,
        in_use: Callable[[], Iterable[Blend]] = lambda: (),
    ) -> None:
        self._components = components
        self._read_file = read
        self._in_use = in_use
        self._state = state
        self._cache = AdapterCache(budget)
        self._intake = Intake(self._read)
        self._known: dict[str, Source] = {}
        self._sets: Sets = {}
        self._merged = MergedWeights()
        self._changes: Changes = {}
        self._blends: weakref.WeakValueDictionary[Any, Blend] = weakref.WeakValueDictionary()
        self._everybody: Blend | None = None  # of the dynamic set
        self._rows = rows
        self.epoch = 0  # counts the sets that were in use: part of the key of whatever they changed

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self._components)

    # -- loading ----------------------------------------------------------------------------------

    def prepare(self, settings: Sequence[LoraSetting]) -> bool:
        """Load what these settings name, all or none; False while a file is still being read."""
        sources = [self._source(setting) for setting in settings]
        if not self._load(sources):
            return False
        self._know(sources)
        return True

    def prepare_job(self, uses: Sequence[LoraUse]) -> list[LoraUse] | None:
        """Load what a job names and check that it could have it now; None while a file is still
        being read. Returns its adapters as accepted. A job may bring a new nickname, but not give
        a known one another meaning."""
        sources = [self._source_of_job(use) for use in uses]
        if not self._load(sources):
            return None
        self._know(s for s in sources if self._known.get(s.nickname, s) == s)
        strengths = [use.strength for use in uses]
        accepted = [s.accepted(force) for s, force in zip(sources, strengths, strict=True)]
        self.blend(accepted)
        return accepted

    def start(
        self,
        settings: Sequence[LoraSetting],
        merge_mode: str = "auto",
        beside: Iterable[Source] = (),
    ) -> None:
        """Take up what an earlier worker left, else begin with these settings. Adapters that lie
        `beside` the model are known where their nicknames are free."""
        self._known = {source.nickname: source for source in beside}
        former = self._state.read()
        if former is not None:
            try:
                self._known |= former.sources
                self._use(former.sets)
            except SglError as error:
                raise self._state.lost(error) from None
        elif settings:
            sources = [self._source(setting) for setting in settings]
            self._known |= {source.nickname: source for source in sources}
            try:
                self.replace(settings, merge_mode)
            except SglError as error:
                raise SetupError(error.message, hint=error.hint) from None

    def delete(self, nickname: str) -> None:
        source = self._find(nickname, "GET /v1/list_loras lists those there are.")
        if any(source in dict(chosen.uses) for chosen in self._sets.values() if chosen.on):
            raise ConflictError(
                f"The adapter {nickname!r} is in use by all jobs.",
                hint="POST /v1/unmerge_lora_weights first.",
                code="lora_in_use",
            )
        if any(source in blend.sources for blend in self._in_use()):
            raise ConflictError(
                f"A job uses the adapter {nickname!r}.", hint="Wait for it.", code="lora_in_use"
            )
        kept = {
            name: chosen for name, chosen in self._sets.items() if source not in dict(chosen.uses)
        }
        known = {name: other for name, other in self._known.items() if name != nickname}
        self._state.write(known, kept)
        self._known, self._sets = known, kept
        self._cache.drop(source)
        self._rows.clear()

    # -- the set that all jobs have ---------------------------------------------------------------

    def replace(self, settings: Sequence[LoraSetting], merge_mode: str) -> None:
        """Replace the set in use by these adapters."""
        uses: dict[str, list[tuple[Source, float]]] = {}
        adapters = [self._fitted(self._source(setting)) for setting in settings]
        for setting, fitted in zip(settings, adapters, strict=True):
            for component in reached(setting.target, fitted, self._components):
                uses.setdefault(component, []).append((fitted.source, setting.strength))
        mode = pick_mode(merge_mode, adapters, self._components)
        self._use({name: Chosen(tuple(each), mode) for name, each in uses.items()})

    def merge(self, target: str, strength: float) -> None:
        """Put the set back into use, every adapter at this strength."""
        wanted = self._reached(target)
        if not wanted:
            raise ConflictError(
                "No adapters were set that could be merged.",
                hint="POST /v1/set_lora first.",
                code="lora_not_set",
            )
        self._use(self._sets | {name: self._sets[name].switched(True, strength) for name in wanted})

    def unmerge(self, target: str) -> None:
        """Take the set out of use; the weights are those that were loaded."""
        wanted = self._reached(target)
        self._use(self._sets | {name: self._sets[name].switched(False) for name in wanted})

    # -- the adapters of one job ------------------------------------------------------------------

    def blend(self, uses: Sequence[LoraUse]) -> Blend | None:
        """What a job gets that names these adapters."""
        if not uses:
            return self._everybody
        if any(chosen.on for chosen in self._sets.values()):
            raise ConflictError(
                "A set of adapters is in use by all jobs; a job cannot have others.",
                hint="POST /v1/unmerge_lora_weights first, or leave lora out.",
                code="lora_set_in_use",
                param="lora",
            )
        parts = tuple(self._components)
        return self._blend(
            [(self._fitted(self._source_of_job(use)), use.strength, parts) for use in uses]
        )

    def report(self) -> dict[str, Any]:
        """What /v1/list_loras shows."""
        in_use = {source for blend in self._in_use() for source in blend.sources}
        return describe(
            self._known, self._sets, self._cache, in_use, self._merged.side_data(), self._components
        )

    # -- inside -----------------------------------------------------------------------------------

    def _read(self, source: Source) -> Fitted:
        return fit(source, self._read_file(source), self._components)

    def _load(self, sources: Sequence[Source]) -> bool:
        for source in sources:
            if self._cache.get(source) is not None:
                continue
            fitted = self._intake.ask(source)
            if fitted is None:
                return False
            self._cache.put(fitted, self._pinned() | set(sources))
        return True

    def _source(self, file: LoraFile) -> Source:
        if file.path is not None:
            return Source.of(file)
        return self._find(file.nickname).adjusted(file)

    def _source_of_job(self, use: LoraUse) -> Source:
        known = self._known.get(use.nickname)
        if known is None or use.accepted:
            return self._source(use)
        if use.path not in (None, known.path) or known.adjusted(use) != known:
            raise ConflictError(
                f"The nickname {use.nickname!r} stands for another adapter.",
                hint="Use another nickname; DELETE /v1/loras/{nickname} frees this one.",
                code="lora_nickname_taken",
                param="lora",
            )
        return known

    def _find(self, nickname: str, hint: str = "") -> Source:
        if nickname not in self._known:
            known = f"known are {listing(self._known)}." if self._known else "none is known yet."
            raise NotFoundError(
                f"There is no adapter {nickname!r}.",
                hint=hint or f"Give its path to load it: {known}",
                code="lora_not_found",
                param="lora_nickname",
            )
        return self._known[nickname]

    def _know(self, sources: Iterable[Source]) -> None:
        """These are the latest to be named; the oldest that nobody needs are forgotten."""
        chosen = {source for each in self._sets.values() for source, _ in each.uses}
        known = latest(self._known, sources, self._pinned() | chosen)
        if known != self._known:
            self._state.write(known, self._sets)
        for nickname in self._known.keys() - known.keys():
            log.info("the adapter %r is forgotten: too many were named after it", nickname)
            self._cache.drop(self._known[nickname])
        self._known = known

    def _fitted(self, source: Source) -> Fitted:
        """The adapter, read again if it had to make room."""
        fitted = self._cache.get(source)
        if fitted is None:
            fitted = self._read(source)
            self._cache.put(fitted, self._pinned())
        return fitted

    def _pinned(self) -> set[Source]:
        by_jobs = {source for blend in self._in_use() for source in blend.sources}
        return by_jobs | {s for c in self._sets.values() if c.on for s, _ in c.uses}

    def _reached(self, target: str) -> list[str]:
        check_target(target, self._components)
        return [name for name in self._sets if target in ("all", name)]

    def _blend(self, uses: Sequence[Use]) -> Blend:
        for fitted, _, _ in uses:
            check_applicable(fitted, "lora", "Merge it for all jobs: POST /v1/set_lora.")
        blend = self._blends.get(blend_key(uses))
        if blend is None:
            blend = make_blend(uses)
            self._blends[blend.key] = blend
        return blend

    def _use(self, sets: Sets) -> None:
        """Have these sets in use: the weights, then the file; as before on an error."""
        changes: dict[str, tuple[Change, ...]] = {}
        dynamic: list[Use] = []
        for component, chosen in sets.items():
            if not chosen.on:
                continue
            for source, strength in chosen.uses:
                fitted = self._fitted(source)
                if chosen.mode == "dynamic":
                    dynamic.append((fitted, strength, (component,)))
                else:
                    more = tuple((place, strength) for place in fitted.places[component])
                    changes[component] = changes.get(component, ()) + more
        everybody = self._blend(dynamic) if dynamic else None
        former, self._changes = self._changes, changes
        try:
            self._merged.replace(changes)
            if sets != self._sets:
                self._store(sets, former)
        except Exception:
            self._changes = former
            raise
        self._sets, self._everybody = sets, everybody
        self.epoch += 1
        self._rows.clear()

    def _store(self, sets: Sets, former: Changes) -> None:
        try:
            self._state.write(self._known, sets)
        except SglError:
            self._merged.replace(former)
            raise
