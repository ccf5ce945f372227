"""Adapters merged into the weights, in place, and taken out again bit for bit.

Low-rank changes go through `ops.lora_merge_`, which keeps a few bits per weight to undo them. Other
changes (whole deltas, biases, DoRA, LoHa, LoKr) keep a copy of the rows that they reach.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sgl_diffusion import ops
from sgl_diffusion.base.log import get_logger
from sgl_diffusion.engine.lora.fit import Place
from sgl_diffusion.loader.adapters.types import FullDelta, LowRank
from sgl_diffusion.ops import LoraDelta, LoraRecord
from sgl_diffusion.orchestrator.stage import CannotGoOnError

log = get_logger(__name__)

Change = tuple[Place, float]  # and at which strength
Changes = Mapping[str, tuple[Change, ...]]  # by component


@dataclass
class _Undo:
    """What restores the weights of one component."""

    records: list[tuple[Tensor, LoraRecord]] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class SideData:
    """What is kept to undo the merges, beside the adapters themselves."""

    nbytes: int
    weights: int
    copied_layers: int

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.nbytes / max(self.weights, 1)


class MergedWeights:
    def __init__(self) -> None:
        self._changes: dict[str, tuple[Change, ...]] = {}
        self._undo: dict[str, _Undo] = {}

    @torch.inference_mode()
    def replace(self, wanted: Changes) -> None:
        """Have exactly these changes merged; on an error the former ones are merged again."""
        same = [name for name, old in self._changes.items() if wanted.get(name) == old]
        former = {name: old for name, old in self._changes.items() if name not in same}
        self._take_out(former)
        try:
            self._put_in({name: new for name, new in wanted.items() if name not in same})
        except CannotGoOnError:
            raise
        except Exception:
            log.exception("a merge failed; the former adapters are merged again")
            self._take_out([name for name in self._changes if name not in same])
            self._put_in_again(former)
            raise

    def side_data(self) -> SideData:
        undos = self._undo.values()
        records = [record for undo in undos for _, record in undo.records]
        copies = [kept for undo in undos for _, kept in undo.copies]
        return SideData(
            nbytes=sum(record.nbytes for record in records) + sum(kept.nbytes for kept in copies),
            weights=sum(record.shape[0] * record.shape[1] for record in records)
            + sum(kept.numel() for kept in copies),
            copied_layers=len(copies) + sum(record.is_copy for record in records),
        )

    def _take_out(self, components: Iterable[str]) -> None:
        for component in list(components):
            undo = self._undo.get(component, _Undo())
            try:
                for view, kept in undo.copies:
                    view.copy_(kept)
                weights, records = [w for w, _ in undo.records], [r for _, r in undo.records]
                ops.lora_unmerge_(weights, records)
            except Exception as error:
                raise CannotGoOnError("the weights cannot be restored") from error
            self._undo.pop(component, None)
            self._changes.pop(component, None)

    def _put_in(self, wanted: Changes) -> None:
        for component, changes in wanted.items():
            groups: dict[tuple[int, str], list[Change]] = {}
            for change in changes:
                place = change[0]
                groups.setdefault((id(place.module), place.delta.parameter), []).append(change)
            low = [group for group in groups.values() if _is_low_rank(group)]
            weights = [_matrix(group[0][0].parameter) for group in low]
            undo = self._undo[component] = _Undo()
            self._changes[component] = changes
            records = _merge(weights, [[_delta(*change) for change in group] for group in low])
            undo.records += zip(weights, records, strict=True)
            for group in groups.values():
                if not _is_low_rank(group):
                    undo.copies.append(_merge_with_copy(group))

    def _put_in_again(self, former: Changes) -> None:
        try:
            self._put_in(former)
        except Exception as error:
            raise CannotGoOnError("the former adapters cannot be merged again") from error


def _is_low_rank(group: Sequence[Change]) -> bool:
    return all(isinstance(place.delta, LowRank) for place, _ in group)


def _matrix(parameter: Tensor) -> Tensor:
    return parameter if parameter.ndim == 2 else parameter.view(parameter.shape[0], -1)


def _delta(place: Place, strength: float) -> LoraDelta:
    assert isinstance(place.delta, LowRank)
    down, up = place.delta.down, place.delta.up
    return LoraDelta(down, up, strength * place.delta.scale, place.start)


def _merge(weights: list[Tensor], deltas: list[list[LoraDelta]]) -> tuple[LoraRecord, ...]:
    """An error leaves the weights as they were, or nobody knows how, and then it is fatal."""
    try:
        return ops.lora_merge_(weights, deltas)
    except ValueError:
        raise  # an adapter that is not finite: found before any weight has changed
    except Exception as error:
        raise CannotGoOnError("a merge broke off") from error


def _merge_with_copy(group: Sequence[Change]) -> tuple[Tensor, Tensor]:
    """All changes of one parameter, summed in fp32 and rounded once; the rows and their copy."""
    places = [place for place, _ in group]
    parameter = places[0].parameter
    ends = [place.start + _rows(place, parameter) for place in places]
    first, last = min(place.start for place in places), max(ends)
    view = parameter[first:last]
    kept = view.clone()
    total = kept.to(torch.float32, copy=True)
    for (place, strength), end in zip(group, ends, strict=True):
        rows = slice(place.start - first, end - first)
        total[rows] += place.delta.delta(kept[rows], strength).view_as(total[rows])
    view.copy_(total)
    return view, kept


def _rows(place: Place, parameter: Tensor) -> int:
    if isinstance(place.delta, FullDelta):
        return place.delta.value.numel() * parameter.shape[0] // parameter.numel()
    return place.delta.shape[0]
