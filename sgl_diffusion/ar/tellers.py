"""What the thinker tells the talker: vectors of the prompt to begin with, then of each word.

The talker needs nothing else of the thinker's weights, so it can live in another process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sgl_diffusion.ar.prompt import Prompt
from sgl_diffusion.ar.row import Row
from sgl_diffusion.ar.thinker import Tap, rope_positions
from sgl_diffusion.ar.voices import Voice, read_voices, voice_names
from sgl_diffusion.orchestrator.messages import Payload

# The tokens of a talker's prompt that stand for "<|im_start|>assistant\n".
_ROLE = 3


class Teller(Protocol):
    """`tap` says what is kept of the thinker's states; one that `reads` wants states of a given
    text, too."""

    tap: Tap
    reads: bool
    voices: tuple[str, ...]

    def opening(self, row: Row, first: Tensor) -> tuple[Payload, list[Tensor]]:
        """What the talker needs to begin, with the vector of the first word."""

    def words(self, row: Row) -> list[Tensor]:
        """Vectors of those of the row's unspoken words that can be said now."""

    def last_word(self) -> Tensor:
        """What stands for the end of the text."""


def make_teller(folder: Path, thinker: Any) -> Teller | None:
    """`thinker` is the loaded model; None where the checkpoint has no talker."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if not config.enable_audio_output:
        return None
    if config.model_type == "qwen2_5_omni":
        return Qwen25Teller(config, thinker, read_voices(folder))
    return Qwen3Teller(config, thinker, voice_names(folder, config))


class _Words:
    """The vectors of tokens of text."""

    def __init__(self, thinker: Any) -> None:
        self.thinker = thinker
        self._embed = thinker.get_input_embeddings()

    @torch.inference_mode()
    def embedded(self, *tokens: int) -> Tensor:
        ids = torch.tensor(tokens, dtype=torch.long, device=self.thinker.device)
        vectors: Tensor = self._embed(ids)
        return vectors

    def placed(self, prompt: Prompt, tokens: list[int]) -> tuple[Tensor, int]:
        """Positions by the rules of the thinker; the talker's own want what its configuration
        lacks."""
        ids = torch.tensor([tokens], device=self.thinker.device)
        return rope_positions(self.thinker, prompt.media, ids)


class Qwen3Teller:
    """The talker gets what the user said, with the thinker's states where media are, and embedded
    tokens of the answer."""

    reads = False

    def __init__(self, config: Any, thinker: Any, voices: tuple[str, ...]) -> None:
        self._config = config
        self._words = _Words(thinker)
        self.voices = voices
        self.tap = Tap(layer=int(config.talker_config.accept_hidden_layer))

    def opening(self, row: Row, first: Tensor) -> tuple[Payload, list[Tensor]]:
        prompt, passage = row.job.prompt, row.passage
        assert prompt is not None
        places = self._asked(prompt)
        asked = [prompt.tokens[at] for at in places]
        at = torch.tensor(places, dtype=torch.long, device=passage.media.device)
        felt = passage.vectors[:0] if passage.states is None else passage.all_states()
        none, begin = self._config.tts_pad_token_id, self._config.tts_bos_token_id
        answer = self._words.embedded(*prompt.tokens[-_ROLE:], none, none, none, none, begin)
        spoken = [*asked, *[none] * (len(answer) + 1)]
        positions, shift = self._words.placed(prompt, spoken)
        arrays = [
            self._words.embedded(*asked),
            passage.media[at],
            felt,
            torch.cat([answer, first[None]]),
            self._words.embedded(none)[0],
            positions,
        ]
        return {"shift": shift}, arrays

    def words(self, row: Row) -> list[Tensor]:
        tokens = list(row.unspoken)
        row.unspoken.clear()
        return list(self._words.embedded(*tokens))

    def last_word(self) -> Tensor:
        return self._words.embedded(self._config.tts_eos_token_id)[0]

    def _asked(self, prompt: Prompt) -> list[int]:
        """Where the tokens of the user's messages are: the talker knows nothing of the others."""
        places, user = [], False
        for at, token in enumerate(prompt.tokens):
            if token == self._config.im_start_token_id:
                user = prompt.tokens[at + 1] == self._config.user_token_id
            if user:
                places.append(at)
        return places


class Qwen25Teller:
    """The talker gets every token with the thinker's last state of it: of the prompt, where media
    have their states only, and of the answer. A token has a state when it is read, one step after
    it is written; the last one of an answer that is cut off has none, and is not said."""

    reads = True
    tap = Tap(everything=True)

    def __init__(self, config: Any, thinker: Any, voices: dict[str, Voice]) -> None:
        self._config = config.talker_config
        self._words = _Words(thinker)
        self._begins = {name: voice.begin for name, voice in voices.items()}
        self.voices = tuple(voices)

    def opening(self, row: Row, first: Tensor) -> tuple[Payload, list[Tensor]]:
        prompt, passage, manner = row.job.prompt, row.passage, row.job.params.speech
        assert prompt is not None and manner is not None
        begin = self._begins[manner.voice]
        length = len(prompt.tokens)
        vectors = passage.vectors[:length].masked_fill(passage.media[:length, None], 0)
        vectors = passage.all_states()[:length] + vectors
        positions, shift = self._words.placed(prompt, [*prompt.tokens, begin, begin])
        arrays = [
            torch.cat([vectors, self._words.embedded(begin), first[None]]),
            self._words.embedded(self._config.tts_text_pad_token_id)[0],
            positions,
        ]
        return {"shift": shift}, arrays

    def words(self, row: Row) -> list[Tensor]:
        found = []
        while row.unspoken and row.states:
            token, state = row.unspoken.popleft(), row.states.popleft()
            found.append(state + self._words.embedded(token)[0])
        return found

    def last_word(self) -> Tensor:
        return self._words.embedded(self._config.tts_text_end_token_id)[0]
