"""Speaking for the rows of a chat: Qwen3's talker and vocoder behind the thinker.

A speech begins with the first word that the thinker has written, or that was given.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.ar.prompt import Prompt
from sgl_diffusion.ar.row import Row
from sgl_diffusion.ar.speech import SpeechBatch, SpeechRow
from sgl_diffusion.ar.talker import SpeechTokens, Talker
from sgl_diffusion.ar.thinker import rope_positions
from sgl_diffusion.ar.vocoder import Vocoder
from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.components.pretrained import load_part
from sgl_diffusion.orchestrator.messages import Metric

# Gets new samples of a row, and with the last of them why the speech ended.
OnSound = Callable[[Row, Tensor, str | None], None]
SAMPLE_RATE = 24_000
_USUAL = "ethan"


class Qwen3Speaker:
    def __init__(
        self, config: Any, thinker: Any, talker: Talker, vocoder: Vocoder, on_sound: OnSound
    ) -> None:
        self._config = config
        self._thinker = thinker
        self._talker = talker
        self._on_sound = on_sound
        self._batch = SpeechBatch(talker, vocoder, self._heard)
        self._speeches: dict[Row, SpeechRow] = {}
        self._rows: dict[SpeechRow, Row] = {}
        self.voices = tuple(sorted(talker.voices(), key=lambda name: (name != _USUAL, name)))
        self.tap = int(config.talker_config.accept_hidden_layer)
        self.sample_rate = SAMPLE_RATE

    @classmethod
    def load(
        cls, folder: Path, thinker: Any, rows: int, dtype: torch.dtype, on_sound: OnSound
    ) -> Qwen3Speaker | None:
        """None where the checkpoint has no talker. `thinker` is the loaded model."""
        from transformers import AutoConfig
        from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as models

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if not config.enable_audio_output:
            return None
        voices = config.talker_config.speaker_id
        if not voices:
            raise SetupError(f"The talker in {folder} has no voices.", code="bad_checkpoint")
        how: dict[str, Any] = {"dtype": dtype, "device": thinker.device}
        kind = models.Qwen3OmniMoeTalkerForConditionalGeneration
        talker = load_part(kind, config.talker_config, folder, "talker.", **how)
        code2wav = load_part(
            models.Qwen3OmniMoeCode2Wav, config.code2wav_config, folder, "code2wav.", **how
        )
        embed = thinker.get_input_embeddings()
        return cls(
            config,
            thinker,
            Talker(talker, embed, SpeechTokens.of(config), rows),
            Vocoder(code2wav),
            on_sound,
        )

    def say(self, row: Row) -> None:
        """Take over what the row has written since the last time."""
        words = row.words()
        if words and row not in self._speeches:
            self._begin(row, words.pop(0))
        speech = self._speeches.get(row)
        ended = row.finish_reason is not None
        if speech is None:
            if ended:
                self._on_sound(row, torch.zeros(0), "stop")
            return
        vectors = [self._talker.words(words)] if words else []
        if ended:
            vectors.append(self._talker.last_word()[None])
        if vectors:
            speech.tell(torch.cat(vectors), 0)
        speech.characters = len(row.writing.text)
        speech.told_all = ended

    def drop(self, row: Row) -> None:
        speech = self._speeches.pop(row, None)
        if speech is not None:
            self._batch.drop(speech)
            del self._rows[speech]

    def step(self) -> bool:
        return self._batch.step()

    def metrics(self) -> list[Metric]:
        return [
            Metric(name="talker_steps_total", value=count, labels={"rows": str(rows)})
            for rows, count in sorted(self._batch.steps.items())
        ]

    def forget_steps(self) -> None:
        self._batch.steps.clear()

    # -- inside -----------------------------------------------------------------------------------

    def _begin(self, row: Row, first: int) -> None:
        manner, prompt = row.job.params.speech, row.job.prompt
        assert manner is not None and prompt is not None
        asked = torch.tensor(self._asked(prompt), dtype=torch.long)
        tokens = torch.tensor(prompt.tokens)
        passage = row.passage
        heard = passage.media[asked.to(passage.media.device)]
        felt = passage.vectors.new_zeros(0, passage.vectors.shape[1])
        if passage.states:
            felt = torch.cat([passage.states[start] for start in sorted(passage.states)])
        voice = self._talker.voices()[manner.voice]
        start = len(prompt.tokens) - 3
        opening = self._talker.opening(
            tokens[asked].tolist(), felt, heard, prompt.tokens[start:], first, voice
        )
        silent = [self._config.tts_pad_token_id] * (len(opening) - len(asked))
        spoken = torch.tensor([*tokens[asked].tolist(), *silent], device=opening.device)[None]
        # The rules are those of the thinker; the talker's own want what its configuration lacks.
        positions, shift = rope_positions(self._thinker, prompt.media, spoken)
        speech = SpeechRow(
            opening, positions, shift, row.job.params.sampling.seed + row.index, manner
        )
        self._speeches[row], self._rows[speech] = speech, row
        self._batch.add(speech)

    def _asked(self, prompt: Prompt) -> list[int]:
        """Where the tokens of the user's messages are: the talker knows nothing of the others."""
        places, user = [], False
        for at, token in enumerate(prompt.tokens):
            if token == self._config.im_start_token_id:
                user = prompt.tokens[at + 1] == self._config.user_token_id
            if user:
                places.append(at)
        return places

    def _heard(self, speech: SpeechRow, samples: Tensor) -> None:
        row = self._rows[speech]
        row.frames = len(speech.history)
        if speech.finish_reason is not None:
            del self._speeches[row], self._rows[speech]
        self._on_sound(row, samples, speech.finish_reason)
