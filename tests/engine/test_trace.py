from __future__ import annotations

import threading

import pytest
import torch

from sgl_diffusion.base.errors import ConflictError
from sgl_diffusion.engine.profile import run_profile
from sgl_diffusion.engine.trace import Trace


def test_nothing_is_kept_while_it_is_off() -> None:
    trace = Trace(torch.device("cpu"))
    with trace.span("before"):
        trace.start()
    with trace.span("inside", rows=2):
        pass
    (_, event) = trace.stop()
    assert event["name"] == "inside" and event["args"] == {"rows": 2}
    with trace.span("after"):
        pass
    trace.start()
    assert trace.stop() == []


def test_threads_have_rows_of_their_own() -> None:
    trace = Trace(torch.device("cpu"))
    trace.start()
    with trace.span("here"):
        other = threading.Thread(target=run_span, args=(trace,), name="lane")
        other.start()
        other.join()
    events = trace.stop()
    names = {event["args"]["name"]: event["tid"] for event in events if event["ph"] == "M"}
    by_name = {event["name"]: event for event in events if event["ph"] == "X"}
    assert by_name["there"]["tid"] == names["lane"] != by_name["here"]["tid"]
    here, there = by_name["here"], by_name["there"]
    assert here["ts"] <= there["ts"] and there["dur"] <= here["dur"]


def run_span(trace: Trace) -> None:
    with trace.span("there"):
        pass


def test_a_long_record_keeps_its_newest_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgl_diffusion.engine.trace._MOST_SPANS", 10)
    trace = Trace(torch.device("cpu"))
    trace.start()
    for number in range(25):
        with trace.span("step", number=number):
            pass
    numbers = [event["args"]["number"] for event in trace.stop() if event["ph"] == "X"]
    assert numbers == list(range(15, 25))


def test_a_record_begins_once_and_ends_once() -> None:
    trace = Trace(torch.device("cpu"))
    with pytest.raises(ConflictError, match="No profile"):
        run_profile(trace, "profile_stop")
    run_profile(trace, "profile_start")
    with pytest.raises(ConflictError, match="already"):
        run_profile(trace, "profile_start")
    assert run_profile(trace, "profile_stop")["traceEvents"] == []
