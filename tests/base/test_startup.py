"""What a start took its time for."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from sgl_diffusion.base import startup
from sgl_diffusion.base.startup import measuring, spent_on, told


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which passes when a test says so."""
    now = [100.0]
    monkeypatch.setattr(startup, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_everything_has_its_own_time(clock: list[float]) -> None:
    with measuring() as found:
        clock[0] += 1
        with spent_on("imports"):
            clock[0] += 2
        with spent_on("weights"):
            clock[0] += 4
            with spent_on("imports"):
                clock[0] += 8
            clock[0] += 16
    assert found == {"imports": 10, "weights": 20, "other": 1}
    assert told(found) == "imports 10.00, weights 20.00, other 1.00"


def test_an_error_ends_it(clock: list[float]) -> None:
    with measuring() as found:
        with pytest.raises(ValueError, match="no"), spent_on("weights"):
            clock[0] += 1
            raise ValueError("no")
        clock[0] += 2
    assert found == {"weights": 1, "other": 2}


def test_nothing_is_measured_where_nobody_asked(clock: list[float]) -> None:
    with spent_on("weights"):
        clock[0] += 1
    with measuring() as found:
        other = threading.Thread(target=lambda: spent_on("weights").__enter__())
        other.start()
        other.join()
    assert found == {"other": 0}
