from __future__ import annotations

import json
import threading

import pytest
import torch

from sgl_diffusion.base.errors import ConflictError
from sgl_diffusion.base.trace import Record, joined
from sgl_diffusion.engine.profile import run_profile
from sgl_diffusion.engine.trace import Trace


def test_nothing_is_kept_while_it_is_off() -> None:
    trace = Trace(torch.device("cpu"))
    with trace.span("before"):
        trace.start()
    with trace.span("inside", rows=2):
        pass
    (_, event) = trace.stop()["traceEvents"]
    assert event["name"] == "inside" and event["args"] == {"rows": 2}
    with trace.span("after"):
        pass
    trace.start()
    assert trace.stop()["traceEvents"] == []


def test_threads_have_rows_of_their_own() -> None:
    trace = Trace(torch.device("cpu"))
    trace.start()
    with trace.span("here"):
        other = threading.Thread(target=run_span, args=(trace,), name="lane")
        other.start()
        other.join()
    events = trace.stop()["traceEvents"]
    names = {event["args"]["name"]: event["tid"] for event in events if event["ph"] == "M"}
    by_name = {event["name"]: event for event in events if event["ph"] == "X"}
    assert by_name["there"]["tid"] == names["lane"] != by_name["here"]["tid"]
    here, there = by_name["here"], by_name["there"]
    assert here["ts"] <= there["ts"] and there["dur"] <= here["dur"]


def run_span(trace: Trace) -> None:
    with trace.span("there"):
        pass


def test_a_long_record_keeps_its_newest_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgl_diffusion.base.trace._MOST_SPANS", 10)
    trace = Trace(torch.device("cpu"))
    trace.start()
    for number in range(25):
        with trace.span("step", number=number):
            pass
    events = trace.stop()["traceEvents"]
    numbers = [event["args"]["number"] for event in events if event["ph"] == "X"]
    assert numbers == list(range(15, 25))


def test_processes_share_a_clock() -> None:
    """The second begins while the first is at work: its spans stand where they were."""
    one, other = Record(), Record()
    one.start()
    with one.span("outer"):
        other.start()
        with other.span("inner"):
            pass
    file = json.loads(json.dumps(joined({"server": one.stop(), "worker": other.stop()})))
    events = file["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {1: "server", 2: "worker"}
    outer, inner = (next(e for e in events if e["name"] == name) for name in ("outer", "inner"))
    assert (outer["pid"], inner["pid"]) == (1, 2)
    assert outer["ts"] < inner["ts"]
    assert inner["ts"] + inner["dur"] < outer["ts"] + outer["dur"] + 0.2  # rounded to a tenth


def test_a_record_begins_once_and_ends_once() -> None:
    trace = Trace(torch.device("cpu"))
    with pytest.raises(ConflictError, match="No profile"):
        run_profile(trace, "profile_stop")
    run_profile(trace, "profile_start")
    with pytest.raises(ConflictError, match="already"):
        run_profile(trace, "profile_start")
    assert run_profile(trace, "profile_stop")["traceEvents"] == []
