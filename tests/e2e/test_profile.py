"""Records of a worker: over HTTP, from the command line, and the dashboard of the metrics."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from sgl_diffusion.cli import sglang
from sgl_diffusion.engine import worker
from sgl_diffusion.orchestrator.tally import Tally, restarts
from tests.exposition import Scrape

DASHBOARD = Path(__file__).parents[2] / "docs/grafana.json"
QUANTILE = re.compile(
    r"histogram_quantile\((?P<quantile>[\d.]+), sum by \(le, kind\) "
    r"\(rate\((?P<name>sgld_\w+)_bucket(\{[^{}]*\})?\[5m\]\)\)\)"
)
BODY = {"prompt": "a cat", "size": "48x32", "num_inference_steps": 3}


def spans(trace: dict[str, Any]) -> Counter[str]:
    return Counter(event["name"] for event in trace["traceEvents"] if event["ph"] == "X")


def test_a_record_over_http(server):
    assert server.http.post("/stop_profile").status_code == 409
    assert server.http.post("/start_profile").json()["status"] == "ok"
    assert server.http.post("/start_profile").status_code == 409
    assert server.http.post("/v1/images/generations", json=BODY).status_code == 200
    trace = server.http.post("/stop_profile").json()
    counts = spans(trace)
    assert counts["denoise"] == 3 and counts["encode"] == 1 and counts["decode"] >= 1
    for event in trace["traceEvents"]:
        assert event["ph"] in "XM" and isinstance(event["tid"], int)
        assert event["ph"] == "M" or (event["ts"] >= 0 and event["dur"] > 0)
    steps = [event for event in trace["traceEvents"] if event["name"] == "denoise"]
    assert all(step["args"]["rows"] == 1 and step["args"]["size"] == "48x32" for step in steps)
    assert server.http.post("/stop_profile").status_code == 409


def test_a_record_shows_what_goes_on_at_the_same_time(server):
    """Clips come and go beside a long one: their prompts, decodes and files beside its steps."""
    body = {"size": "48x32", "num_frames": 9}
    long = server.video(**body, num_inference_steps=200)
    server.wait_until("it runs", lambda: server.state(long)["progress"] > 0)
    assert server.http.post("/start_profile").status_code == 200
    short = [server.video(**body, prompt=f"wave {n}", num_inference_steps=2) for n in range(3)]
    assert {server.finished(clip)["status"] for clip in short} == {"completed"}
    events = server.http.post("/stop_profile").json()["traceEvents"]
    assert server.http.delete(f"/v1/videos/{long}").status_code == 200
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert set(names.values()) == {"server", "diffusion"}
    steps = [e for e in events if e["name"] == "denoise" and long in e["args"]["jobs"]]
    for name, process in (("encode", "diffusion"), ("decode", "diffusion"), ("file", "server")):
        mine = [e for e in events if e["name"] == name and e["args"]["job"] in short]
        assert {e["args"]["job"] for e in mine} == set(short), name
        assert {names[e["pid"]] for e in mine} == {process}
        assert any(meet(e, step) for e in mine for step in steps), name


def meet(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether there is a moment that is in both, in different threads."""
    apart = (one["pid"], one["tid"]) != (other["pid"], other["tid"])
    begin, end = (max(one["ts"], other["ts"]), min(e["ts"] + e["dur"] for e in (one, other)))
    return apart and begin < end


def show(server):
    """A request that is in every histogram."""
    streamed = {**BODY, "stream": True, "partial_images": 1}
    assert "partial_image" in server.http.post("/v1/images/generations", json=streamed).text


def test_every_metric_of_the_dashboard_exists(server):
    video = server.video(size="48x32", num_frames=5, num_inference_steps=2)
    server.finished(video)
    assert server.http.post("/v1/images/generations", json={"prompt": ""}).status_code == 400
    show(server)
    shown = {re.match(r"\w+", name)[0] for name in server.metrics()}
    # What only comes with an accident or a GPU: the names are those of the code that counts it.
    shown |= {f"sgld_{m.name}" for m in [*Tally().metrics(), *restarts(Counter({"signal": 1}))]}
    assert '"vram_peak_bytes"' in Path(worker.__file__).read_text()
    shown.add("sgld_vram_peak_bytes")
    panels = json.loads(DASHBOARD.read_text())["panels"]
    named = {
        name
        for panel in panels
        for target in panel["targets"]
        for name in re.findall(r"sgld_\w+", target["expr"])
    }
    assert len(named) > 20 and named <= shown, named - shown


def test_the_dashboard_draws_percentiles_of_every_histogram(server):
    """Each query is a quantile over buckets that a server has, added up by their bounds."""
    show(server)
    drawn: dict[str, set[str]] = {}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    for query in (target["expr"] for panel in panels for target in panel["targets"]):
        if "_bucket" in query or "quantile" in query:
            found = QUANTILE.fullmatch(query)
            assert found, query
            drawn.setdefault(found["name"], set()).add(found["quantile"])
    assert drawn.keys() == Scrape(server.http.get("/metrics").text).histograms.keys()
    assert all({"0.5", "0.95"} <= quantiles for quantiles in drawn.values())


def test_the_command_writes_a_trace_and_a_table(tmp_path, capsys):
    out = tmp_path / "trace.json"
    command = ["profile", "--prompt", "a cat", "--size", "48x32", "--num-frames", "5"]
    command += ["--num-inference-steps", "3", "--warm-up", "0", "--data-dir", str(tmp_path)]
    assert sglang.main([*command, "-o", str(out)]) == 0
    assert spans(json.loads(out.read_text()))["denoise"] == 3
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in printed.splitlines()}
    assert rows["denoise"][1] == "3" and {"encode", "decode", "stage"} <= rows.keys()
    shares = sum(int(rows[name][-1].rstrip("%")) for name in ("encode", "denoise", "decode"))
    assert 98 <= shares <= 102


def test_a_wrong_place_for_the_trace_is_known_before_the_model_is_loaded(capsys):
    assert sglang.main(["profile", "--prompt", "x", "-o", "/nowhere/trace.json"]) == 2
    assert "no folder /nowhere" in capsys.readouterr().err
