"""Two buffers for many units: while one is computed with, the next is brought to the other.

Which one comes next is learned from the last time, so it does not matter how a module goes through
its blocks. Whatever comes is waited for: a wrong guess costs time, never a result.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sgl_diffusion.engine.offload.tiers import Arrival, Carrier
from sgl_diffusion.engine.offload.units import Unit, largest

_BUFFERS = 2


class _Slot:
    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.unit: Unit | None = None
        self.arrival: Arrival | None = None
        self.users = 0
        self.present = False  # the unit's parameters are those in the buffer
        self.marks: list[object] = []  # after which nobody computes with the buffer

    def has(self, unit: Unit) -> bool:
        """It is there, or on its way."""
        return self.unit is unit and self.arrival is not None and not self.arrival.failed

    def show(self) -> None:
        assert self.unit is not None and self.buffer is not None
        for place in self.unit.places:
            value = nn.Parameter(place.view(self.buffer), requires_grad=False)
            place.owner._parameters[place.leaf] = value
        self.present = True

    def hide(self) -> None:
        assert self.unit is not None
        for place in self.unit.places:
            place.owner._parameters[place.leaf] = place.parameter
        self.present = False

    def empty(self) -> None:
        self.buffer = self.unit = self.arrival = None
        self.marks = []


class _Own(threading.local):
    """Of one thread: how deep it is in calls of watched modules, and its unit before this one."""

    depth = 0
    last: Unit | None = None


class Ring:
    """The units of one component. Several threads may compute with them."""

    def __init__(self, units: Sequence[Unit], carrier: Carrier, *, keep: bool) -> None:
        """`keep` says that buffers stay when nobody computes: they are soon needed again."""
        self._carrier = carrier
        self._keep = keep
        self._size = largest(units)
        self._slots = [_Slot() for _ in range(_BUFFERS)]
        self._changed = threading.Condition()
        self._followers: dict[Unit, Unit] = {}
        self._own = _Own()
        self._passes = 0
        self.brought_late = 0  # units that were not even under way when they were needed
        for unit in units:
            unit.module.forward = self._around(unit, unit.module.forward)

    @property
    def held(self) -> int:
        """Bytes of the buffers that are there now."""
        return sum(slot.buffer.nbytes for slot in self._slots if slot.buffer is not None)

    def watch(self, module: nn.Module) -> None:
        """While a module is called that the units are a part of, buffers stay."""
        module.forward = self._through(module.forward)

    def _around(self, unit: Unit, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if _only_counted(args, kwargs):
                return forward(*args, **kwargs)
            slot = self._enter(unit)
            try:
                return forward(*args, **kwargs)
            finally:
                self._leave(slot)

        return run

    def _through(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._begin()
            try:
                return forward(*args, **kwargs)
            finally:
                self._end()

        return run

    def _begin(self) -> None:
        if self._own.depth == 0 and not self._keep:
            self._own.last = None
        self._own.depth += 1
        with self._changed:
            self._passes += 1

    def _end(self) -> None:
        self._own.depth -= 1
        with self._changed:
            self._passes -= 1
            if self._passes == 0 and not self._keep:
                for slot in self._slots:
                    if slot.users == 0:
                        slot.empty()

    def _enter(self, unit: Unit) -> _Slot:
        with self._changed:
            slot = self._find(unit)
            slot.users += 1
            arrival = slot.arrival
            assert arrival is not None
            if self._own.last is not None:
                self._followers[self._own.last] = unit
            self._own.last = unit
        try:
            arrival.wait()
        except BaseException:
            self._leave(slot)
            raise
        with self._changed:
            if not slot.present:
                slot.show()
            self._send_for(self._followers.get(unit))
        return slot

    def _find(self, unit: Unit) -> _Slot:
        """The buffer with a unit, or one that it is brought to from now on."""
        while True:
            for slot in self._slots:
                if slot.has(unit):
                    return slot
            for slot in sorted(self._slots, key=lambda slot: slot.unit is not None):
                if slot.users == 0:
                    self.brought_late += 1
                    self._bring(unit, slot)
                    return slot
            self._changed.wait()

    def _send_for(self, unit: Unit | None) -> None:
        """Bring what will be needed next, where there is a buffer for it."""
        if unit is None or any(slot.has(unit) for slot in self._slots):
            return
        for slot in self._slots:
            if slot.users == 0:
                self._bring(unit, slot)
                return

    def _bring(self, unit: Unit, slot: _Slot) -> None:
        if slot.buffer is None:
            slot.buffer = self._carrier.buffer(self._size)
            slot.marks = [self._carrier.mark(slot.buffer)]
        slot.unit, slot.arrival = unit, None
        slot.arrival = self._carrier.bring(unit, slot.buffer, slot.marks)
        slot.marks = []

    def _leave(self, slot: _Slot) -> None:
        with self._changed:
            assert slot.buffer is not None
            slot.marks.append(self._carrier.mark(slot.buffer))
            slot.users -= 1
            if slot.users == 0 and slot.present:
                slot.hide()
            self._changed.notify_all()


def _only_counted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Work on tensors without numbers needs no numbers of weights, either."""
    return any(isinstance(value, FakeTensor) for value in (*args, *kwargs.values()))
