"""Files of adapters that are read beside the jobs: a few at a time, none kept in vain."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from sgl_diffusion.engine.lora import intake
from sgl_diffusion.engine.lora.fit import Source
from sgl_diffusion.engine.lora.intake import AT_ONCE, Intake


def test_a_few_at_a_time_and_what_nobody_claims_makes_room(monkeypatch: Any) -> None:
    gate, begun = threading.Event(), []

    def read(source: Source) -> Any:
        begun.append(source.nickname)
        gate.wait(10)
        if source.nickname == "0":
            raise OSError("no such file")
        return source.nickname

    taker = Intake(read)
    sources = [Source(str(number), "path") for number in range(AT_ONCE + 2)]
    assert [taker.ask(source) for source in sources] == [None] * len(sources)
    gate.set()
    until = time.monotonic() + 10
    while (found := taker.ask(sources[1])) is None and time.monotonic() < until:
        time.sleep(0.005)
    assert found == "1"
    with pytest.raises(OSError, match="no such file"):
        while taker.ask(sources[0]) is None and time.monotonic() < until:
            time.sleep(0.005)
    assert sorted(begun) == [str(number) for number in range(AT_ONCE)]

    gate.clear()
    assert taker.ask(sources[1]) is None and taker.ask(sources[-2]) is None
    assert taker.ask(sources[-1]) is None and len(begun) == AT_ONCE + 2
    monkeypatch.setattr(intake, "UNCLAIMED_SECONDS", 0.0)  # nobody came back for 2 and 3
    assert taker.ask(sources[-1]) is None
    gate.set()
    while (found := taker.ask(sources[-1])) is None and time.monotonic() < until:
        time.sleep(0.005)
    assert found == str(AT_ONCE + 1)
