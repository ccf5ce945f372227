"""Greedy text is token-equal to transformers' `generate`, alone and among others."""

from __future__ import annotations

from pathlib import Path

import sgl_diffusion
from sgl_diffusion.base.chat import ChatParams
from tests.ar.chats import ask, open_worker, oracle, part, run, submit, tokens_of

ROOT = Path(sgl_diffusion.__file__).parent


def test_what_serves_never_calls_a_library_s_generate() -> None:
    rooms = [ROOT / room for room in ("ar", "apps", "client", "orchestrator", "server")]
    sources = [file for room in rooms for file in room.rglob("*.py")]
    assert len(sources) > 100
    assert [str(file) for file in sources if ".generate(" in file.read_text()] == []


def questions(media: dict[str, Path]) -> dict[str, ChatParams]:
    image, audio, video = (media[kind] for kind in ("image", "audio", "video"))
    return {
        "text": ask("a big red house by the river"),
        "system": ask("what is it", system="you are a small green robot in a boat"),
        "image": ask("look at this ", image, " and that"),
        "audio": ask(audio, "what was it"),
        "video": ask(video, "who is running"),
        "mixed": ask(image, audio, "both", video, "and again", image),
    }


def test_alone(tiny_omni: Path, media: dict[str, Path]) -> None:
    worker, outbox = open_worker(tiny_omni, speech=False)
    for name, params in questions(media).items():
        submit(worker, name, params)
        run(worker)
        assert tokens_of(outbox, name) == oracle(tiny_omni).answer(params), name
    assert set(part(worker, "thinker").batch.steps) == {1}
    assert len({tuple(tokens_of(outbox, name)) for name in outbox.meta}) == len(outbox.meta)


def test_in_one_batch_that_rows_join_and_leave(tiny_omni: Path, media: dict[str, Path]) -> None:
    worker, outbox = open_worker(tiny_omni, speech=False, rows=4)
    asked = questions(media)
    for name, params in asked.items():
        submit(worker, name, params)
        worker.step()
    run(worker)
    for name, params in asked.items():
        assert tokens_of(outbox, name) == oracle(tiny_omni).answer(params), name
    sizes = {int(m.labels["rows"]) for m in worker.metrics() if m.name == "decode_steps_total"}
    assert max(sizes) > 1
