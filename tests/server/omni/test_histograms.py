"""The histograms of an omni server: waits, first tokens and totals of what was really asked."""

from __future__ import annotations

from tests.exposition import Scrape
from tests.server.omni.conftest import OmniApi, events_of
from tests.server.omni.test_leaving import ENDLESS, LONG, send

WAIT, FIRST, WHOLE = (
    f"sgld_{name}" for name in ("queue_wait_seconds", "first_output_seconds", "job_seconds")
)


def scrape(omni: OmniApi) -> Scrape:
    return Scrape(omni.http.get("/metrics").text)


def test_every_answer_is_counted_once(omni: OmniApi) -> None:
    before = scrape(omni)
    for _ in range(2):
        assert omni.chat().status_code == 200
    assert all(len(omni.chunks()) > 2 for _ in range(3))
    assert omni.chat(temperature=99).status_code == 400
    spoken = {"input": "a cat", "max_new_tokens": 8}
    assert omni.http.post("/v1/audio/speech", json=spoken).status_code == 200
    streamed = omni.http.post("/v1/audio/speech", json={**spoken, "stream_format": "sse"})
    assert events_of(streamed)[-1]["type"] == "speech.audio.done"
    after = scrape(omni)

    def more(name: str, kind: str) -> float:
        return after.count(name, kind=kind) - before.count(name, kind=kind)

    assert [more(name, "chat") for name in (WAIT, FIRST, WHOLE)] == [5, 3, 5]
    assert [more(name, "speech") for name in (WAIT, FIRST, WHOLE)] == [2, 1, 2]
    for kind in ("chat", "speech"):
        assert 0 < after.sum(WAIT, kind=kind) < after.sum(WHOLE, kind=kind)
        assert after.sum(FIRST, kind=kind) < after.sum(WHOLE, kind=kind)
    assert set(after.histograms) == {WAIT, FIRST, WHOLE}


def test_who_leaves_has_waited_and_seen_something_but_taken_no_time(omni: OmniApi) -> None:
    before = scrape(omni)

    def more(name: str) -> float:
        return scrape(omni).count(name, kind="chat") - before.count(name, kind="chat")

    with send(omni, "/v1/chat/completions", {**LONG, **ENDLESS, "stream": True}):
        omni.wait_until("it speaks", lambda: more(FIRST) == 1)
    omni.wait_until("cancelled", lambda: omni.unfinished() == 0)
    assert [more(name) for name in (WAIT, FIRST, WHOLE)] == [1, 1, 0]
