"""Whose turn is it: units of work take turns, the longest waiting first.

A turn taker is anything hashable: the encoding of prompts, one group of rows, the decoding of
finished rows. Nobody waits behind another's whole video, only behind one unit of each other taker.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


class Turns:
    def __init__(self) -> None:
        self._clock = itertools.count(1)
        self._served: dict[Hashable, int] = {}

    def next(self, takers: Mapping[T, int]) -> T:
        """The taker served longest ago; among newcomers the one of the oldest job.

        `takers` maps each taker that has work to the order of its oldest job. Takers without work
        are forgotten, so coming back later is no advantage over a newcomer.
        """
        self._served = {taker: at for taker, at in self._served.items() if taker in takers}
        chosen = min(takers, key=lambda taker: (self._served.get(taker, 0), takers[taker]))
        self._served[chosen] = next(self._clock)
        return chosen
