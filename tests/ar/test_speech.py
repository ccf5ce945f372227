"""Spoken answers: the sound of the model's own whole decode, whoever else is speaking."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sgl_diffusion.ar import speech
from sgl_diffusion.ar.qwen3_talker import Qwen3Talker
from sgl_diffusion.ar.qwen3_vocoder import Qwen3Vocoder
from sgl_diffusion.ar.speech import SpeechBatch, SpeechRow
from sgl_diffusion.ar.talker import Manner


@pytest.fixture(scope="module")
def omni(qwen3_of_transformers: Any) -> Any:
    return qwen3_of_transformers


class Stage:
    """A batch, and what it said."""

    def __init__(self, omni: Any) -> None:
        self._omni = omni
        self.talker = Qwen3Talker(omni.talker, rows=4)
        self._vocoder = Qwen3Vocoder(omni.code2wav, ("ethan",))
        self._streams: dict[SpeechRow, Any] = {}
        self.said: dict[SpeechRow, list[Tensor]] = {}
        self.batch = SpeechBatch(self.talker, self._hear, self._fail)

    def _hear(self, row: SpeechRow, codes: Tensor) -> None:
        stream = self._streams.setdefault(row, self._vocoder.stream("ethan", row.seed))
        self.said.setdefault(row, []).append(stream.add(codes))

    def _fail(self, row: SpeechRow, error: Exception) -> None:
        raise error

    def embedded(self, *tokens: int) -> Tensor:
        vectors: Tensor = self._omni.thinker.get_input_embeddings()(torch.tensor(tokens))
        return vectors.detach()

    def words(self, tokens: list[int]) -> Tensor:
        return self.talker.words(self.embedded(*tokens))

    def begin(self, asked: list[int], *, seed: int = 0) -> SpeechRow:
        none, first = self._omni.config.tts_pad_token_id, self._omni.config.tts_bos_token_id
        opening = [
            self.embedded(*asked),
            torch.zeros(len(asked), dtype=torch.bool),
            torch.empty(0),
            self.embedded(1, 2, 3, none, none, none, none, first, 50),
            self.embedded(none)[0],
            torch.arange(len(asked) + 9).expand(3, -1),
        ]
        row = SpeechRow(self.talker.opening(opening, 0, "ethan"), seed, Manner(), piece=5)
        self.batch.add(row)
        return row

    def end(self, row: SpeechRow) -> None:
        row.tell(self.words([self._omni.config.tts_eos_token_id]), 0)
        row.told_all = True

    def run(self) -> None:
        while self.batch.step():
            pass

    def sound(self, row: SpeechRow) -> Tensor:
        return torch.cat(self.said[row])


def alone(omni: Any, asked: list[int], words: list[int], seed: int) -> Tensor:
    stage = Stage(omni)
    row = stage.begin(asked, seed=seed)
    row.tell(stage.words(words), 3)
    stage.end(row)
    stage.run()
    return stage.sound(row)


def test_words_that_come_late_and_company_change_nothing(
    omni: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speech, "FRAMES_FREE", 12)
    stage = Stage(omni)
    asked = {1: [60, 61, 62, 63], 2: [70, 71]}
    words = {1: [80, 81, 82, 83, 84], 2: [90, 91]}
    rows = {1: stage.begin(asked[1], seed=1)}
    stage.batch.step()
    rows[2] = stage.begin(asked[2], seed=2)
    gone = stage.begin([99], seed=3)
    for index in range(5):
        for key, row in rows.items():
            if index < len(words[key]):
                row.tell(stage.words(words[key][index : index + 1]), 3 * (index == 0))
        stage.batch.step()
        stage.batch.step()
        if index == 2:
            stage.batch.drop(gone)
    for row in rows.values():
        stage.end(row)
    stage.run()
    assert stage.talker.kv.slots == []
    for key, row in rows.items():
        expected = alone(omni, asked[key], words[key], key)
        sound = stage.sound(row)
        assert sound.shape == expected.shape and len(sound) > 1920
        torch.testing.assert_close(sound, expected, atol=1e-4, rtol=0)
    assert not torch.equal(
        alone(omni, asked[2], words[2], 2)[:9000], alone(omni, asked[2], words[2], 7)[:9000]
    )


def test_speech_ends_at_the_cap_of_its_text(omni: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "FRAMES_FREE", 4)
    stage = Stage(omni)
    stage.talker.ends = frozenset()
    row = stage.begin([60, 61])
    row.tell(stage.words([80]), characters=2)
    stage.end(row)
    stage.run()
    assert row.finish_reason == "length"
    frames = 4 + 2 * speech.FRAMES_PER_CHARACTER
    assert len(row.history) == frames
    assert (frames - 1) * 1920 < len(stage.sound(row)) < frames * 1920
