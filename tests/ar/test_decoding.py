"""Steps in fixed shapes, made again from the same memory, give what steps as they come give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sgl_diffusion.ar.decoding import Decoding, Found, Recording
from sgl_diffusion.base.chat import Speech
from tests.ar.chats import ask, open_worker, part, run, submit, tokens_of

STORY = "a cat and a dog in a small boat on the river at the old house with a big red moon " * 4


class Again:
    """Records by making the pass again: from the memory it was made from, to the memory it found.
    So does a CUDA graph."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, make: Callable[[], Found]) -> Recording:
        self.made += 1
        found = make()
        kept = [each.clone() for each in found]

        def replay() -> None:
            for place, fresh in zip(kept, make(), strict=True):
                place.copy_(fresh)

        return Recording(replay, (kept[0], kept[1]))


def test_recorded_steps_are_those_that_come(tiny_omni: Path) -> None:
    """Rows come and go, one is long enough for the slab to grow, and all of them speak."""
    record = Again()
    voice = "Ethan" if "2.5" in tiny_omni.name else "ethan"
    speech = Speech(voice=voice, temperature=0.0, max_frames=6)
    asked = {
        "short": ask("a bird", max_tokens=3, speech=speech),
        "long": ask(STORY, max_tokens=8),
        "drawn": ask("the sea", max_tokens=9, temperature=1.0, seed=3, speech=speech),
        "late": ask("a fox", max_tokens=6),
    }
    plain, expected = open_worker(tiny_omni, rows=6)
    recorded, found = open_worker(tiny_omni, rows=6, record=record)
    for worker in (plain, recorded):
        for name, params in asked.items():
            submit(worker, name, params)
            worker.step()
            worker.step()
        run(worker)
    for name in asked:
        assert tokens_of(found, name) == tokens_of(expected, name)
        assert found.meta[name].get("frames") == expected.meta[name].get("frames")
        for sound, truth in zip(found.outputs[name], expected.outputs[name], strict=True):
            assert sound.shape == truth.shape and abs(sound - truth).max() < 1e-4
    steps = sum(part(recorded, "thinker").batch.steps.values())
    assert 2 < record.made < steps


def test_shapes_are_few(tiny_qwen3_omni: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int]] = []
    make = Decoding._make

    def noted(self: Decoding, shape: tuple[int, int], given: object) -> object:
        shapes.append(shape)
        return make(self, shape, given)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoding, "_make", noted)
    worker, outbox = open_worker(tiny_qwen3_omni, rows=6, record=Again())
    shapes.clear()
    for index in range(7):
        submit(
            worker, str(index), ask(f"{index} {STORY if index == 6 else ''}", max_tokens=4 + index)
        )
    run(worker)
    assert not outbox.errors
    counts = {rows for rows, _ in shapes}
    assert counts <= {1, 2, 4, 6} and max(counts) == 6
    assert {length for _, length in shapes} <= {256, 512}
    assert len(shapes) == len(set(shapes))
