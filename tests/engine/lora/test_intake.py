"""Files of adapters that are read beside the jobs: a few at a time, none kept in vain."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from sgl_diffusion.engine.lora import intake
from sgl_diffusion.engine.lora.fit import Source
from sgl_diffusion.engine.lora.intake import AT_ONCE, Intake


def _wait(happened: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_few_at_a_time_and_what_nobody_claims_makes_room(monkeypatch: Any) -> None:
    gate, begun = threading.Event(), []

    def read(source: Source) -> Any:
        begun.append(source.nickname)
        gate.wait(60)
        if source.nickname == "0":
            raise OSError("no such file")
        return source.nickname

    taker = Intake(read)
    sources = [Source(str(number), "path") for number in range(AT_ONCE + 2)]
    assert [taker.ask(source) for source in sources] == [None] * len(sources)
    gate.set()
    until = time.monotonic() + 60
    while (found := taker.ask(sources[1])) is None and time.monotonic() < until:
        time.sleep(0.005)
    assert found == "1"
    with pytest.raises(OSError, match="no such file"):
        while taker.ask(sources[0]) is None and time.monotonic() < until:
            time.sleep(0.005)
    _wait(lambda: len(begun) >= AT_ONCE)
    assert sorted(begun) == [str(number) for number in range(AT_ONCE)]

    gate.clear()
    assert taker.ask(sources[1]) is None and taker.ask(sources[-2]) is None
    assert taker.ask(sources[-1]) is None
    _wait(lambda: len(begun) >= AT_ONCE + 2)
    assert sorted(begun[AT_ONCE:]) == [sources[1].nickname, sources[-2].nickname]
    _wait(lambda: all(taker._under_way[source].outcome.done() for source in sources[2:4]))
    monkeypatch.setattr(intake, "UNCLAIMED_SECONDS", 0.0)  # nobody came back for 2 and 3
    assert taker.ask(sources[-1]) is None
    gate.set()
    while (found := taker.ask(sources[-1])) is None and time.monotonic() < until:
        time.sleep(0.005)
    assert found == str(AT_ONCE + 1)
