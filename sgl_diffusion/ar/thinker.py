"""The model that reads and writes text: transformers' modules, called one piece at a time.

    Prompt ──Towers──▶ Passage (vectors, positions) ──prefill──▶ logits ──decode──▶ logits …

Both families are built alike: `model.audio_tower`, `model.visual`, `model.language_model`,
`lm_head`. Qwen3 adds features of its vision tower's layers to the first layers of the decoder
(`deep`), Qwen2.5 has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.ar.decoding import Decoding, Record
from sgl_diffusion.ar.kv import KvShape, KvSlab, Slot
from sgl_diffusion.ar.prompt import Prompt
from sgl_diffusion.ar.senses import Medium
from sgl_diffusion.ar.tokenwise import tokenwise
from sgl_diffusion.ar.towers import Felt
from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.base.omni import OMNI_NAMES
from sgl_diffusion.components.pretrained import load_part, load_pretrained
from sgl_diffusion.loader.index import Component, read_config


@dataclass(frozen=True)
class Family:
    """`name` is what the served model is called; `thinker` a class of transformers."""

    name: str
    thinker: str


_THINKERS = {
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
}
FAMILIES = {kind: Family(OMNI_NAMES[kind], thinker) for kind, thinker in _THINKERS.items()}


@dataclass(eq=False)
class Passage:
    """A prompt as the decoder takes it: vectors [L, width], positions [3, L], what is added to the
    first layers at `visual` [L], and by how much later positions differ from the token's index.
    Where the answer will be spoken, `states` keeps what the tapped layer of the thinker makes of
    the media (at `media` [L]) or of everything, by the positions that were read together."""

    vectors: Tensor
    positions: Tensor
    visual: Tensor
    deep: list[Tensor]
    shift: int
    media: Tensor
    states: dict[int, Tensor] | None = None

    def all_states(self) -> Tensor:
        """Those that were kept, in their order."""
        assert self.states is not None
        kept = [self.states[start] for start in sorted(self.states)]
        return torch.cat(kept) if kept else self.vectors[:0]

    def last_states(self, count: int) -> Tensor:
        return self.all_states()[-count:]


@dataclass(frozen=True)
class Tap:
    """Which states of the thinker the talker wants: of the media behind a `layer`, or with
    `everything` the last ones of all tokens."""

    layer: int = 0
    everything: bool = False


def family_of(folder: Path) -> Family:
    kind = str(read_config(folder).get("model_type"))
    if kind not in FAMILIES:
        raise SetupError(
            f"{folder} is of the type {kind!r}, which no omni model here has.",
            hint=f"Served are {', '.join(family.name for family in FAMILIES.values())}.",
            code="unsupported_model",
        )
    return FAMILIES[kind]


def load_thinker(folder: Path, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The thinker of a whole checkpoint."""
    import transformers

    part = Component(folder, "transformers", family_of(folder).thinker)
    return load_pretrained(getattr(transformers, part.class_name), part, dtype=dtype, device=device)


def thinker_config(folder: Path) -> Any:
    from transformers import AutoConfig

    family_of(folder)
    return AutoConfig.from_pretrained(folder, local_files_only=True).thinker_config


def load_towers(folder: Path, *, dtype: torch.dtype, device: torch.device) -> Any:
    """A thinker that sees and hears and has no layers to think with."""
    import transformers

    config = thinker_config(folder)
    config.text_config.num_hidden_layers = 0
    config.text_config.vocab_size = 1
    kind = getattr(transformers, family_of(folder).thinker)
    shell = kind._from_config(config, dtype=dtype).to(device)
    how: dict[str, Any] = {"dtype": dtype, "device": device}
    inner = shell.model
    inner.audio_tower = load_part(
        type(inner.audio_tower), config.audio_config, folder, "thinker.audio_tower.", **how
    )
    inner.visual = load_part(
        type(inner.visual), config.vision_config, folder, "thinker.visual.", **how
    )
    return shell.requires_grad_(False).eval()


def drop_towers(model: Any) -> None:
    """Let go of what only sees and hears, where another process does."""
    del model.model.audio_tower, model.model.visual


def places_of(config: Any) -> dict[str, int]:
    """The placeholder token of each kind of media."""
    return {
        "image": config.image_token_id,
        "video": config.video_token_id,
        "audio": config.audio_token_id,
    }


class Thinker:
    def __init__(
        self, model: Any, rows: int, tap: Tap | None = None, record: Record | None = None
    ) -> None:
        self._model = model
        self._decoder = model.model.language_model
        self.kv = KvSlab(KvShape.of(self._decoder), rows)
        self.max_length = int(self._decoder.config.max_position_embeddings)
        self._few = tokenwise(self._decoder, record)
        self._decoding = Decoding(self.kv, self._next, record)
        self._tap = tap
        self.tells = tap is not None and tap.everything

    @torch.inference_mode()
    def passage(self, prompt: Prompt, felt: list[Felt]) -> Passage:
        """Put the vectors of the media where their tokens are."""
        device = self.kv.shape.device
        tokens = torch.tensor([prompt.tokens], device=device)
        vectors = self._decoder.embed_tokens(tokens)[0]
        visual = torch.zeros(len(prompt.tokens), dtype=torch.bool, device=device)
        media = visual.clone()
        for start, feeling in zip(prompt.marks, felt, strict=True):
            span = slice(start, start + len(feeling.vectors))
            vectors[span] = feeling.vectors
            media[span] = True
            visual[span] = feeling.kind != "audio"
        deep = [
            torch.cat(layers)
            for layers in zip(*(f.deep for f in felt if f.kind != "audio"), strict=True)
        ]
        positions, shift = rope_positions(self._model, prompt.media, tokens)
        return Passage(vectors, positions, visual, deep, shift, media)

    @torch.inference_mode()
    def prefill(self, slot: Slot, passage: Passage, tokens: int) -> Tensor:
        """Read `tokens` more of a passage; returns the logits of the last, fp32 on the CPU."""
        span = slice(slot.length, slot.length + tokens)
        visual = passage.visual[span]
        deep: dict[str, Any] = {}
        if passage.deep and bool(visual.any()):
            before = int(passage.visual[: span.start].sum())
            here = slice(before, before + int(visual.sum()))
            deep = {
                "visual_pos_masks": visual[None],
                "deepstack_visual_embeds": [layer[here] for layer in passage.deep],
            }
        mask = self.kv.prefill(slot, tokens)
        with self._tapped(passage, span):
            states = self._forward(
                passage.vectors[None, span], passage.positions[:, None, span], mask, deep
            )
        if passage.states is not None and self._tap is not None and self._tap.everything:
            passage.states[span.start] = states[0]
        logits: Tensor = self._model.lm_head(states[:, -1])
        return logits[0].float().cpu()

    @contextmanager
    def _tapped(self, passage: Passage, span: slice) -> Iterator[None]:
        """Keep the states of the media that are read within the block."""
        tap = self._tap
        if tap is None or tap.everything or passage.states is None:
            yield
            return
        if not bool(passage.media[span].any()):
            yield
            return

        def keep(_: Any, __: Any, states: Tensor) -> None:
            assert passage.states is not None
            passage.states[span.start] = states[0][passage.media[span]]

        hook = self._decoder.layers[tap.layer - 1].register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    @torch.inference_mode()
    def decode(self, tokens: list[int | None], shifts: list[int]) -> tuple[Tensor, Tensor]:
        """One token for each row in the slab, None for one that does not write yet; returns
        [rows, vocabulary], fp32 on the CPU, and the states behind it."""
        device = self.kv.shape.device
        at = [slot.length + shift for slot, shift in zip(self.kv.slots, shifts, strict=True)]
        ids = torch.tensor([token or 0 for token in tokens], device=device)
        logits, states = self._decoding.step(
            ids, torch.tensor(at, device=device), [token is not None for token in tokens]
        )
        return logits.float().cpu(), states

    def _next(self, ids: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        vectors = self._decoder.embed_tokens(ids[:, None])
        places = positions[None, :, None].expand(3, -1, -1)
        if self._few is None:
            states = self._forward(vectors, places, mask, {})[:, -1]
        else:
            states = self._few(vectors, places, self.kv, mask)[:, -1]
        return self._model.lm_head(states), states

    def _forward(
        self, vectors: Tensor, positions: Tensor, mask: Tensor, more: dict[str, Any]
    ) -> Tensor:
        output = self._decoder(
            inputs_embeds=vectors,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.kv,
            use_cache=True,
            **more,
        )
        states: Tensor = output.last_hidden_state
        return states


def rope_positions(model: Any, media: Sequence[Medium], tokens: Tensor) -> tuple[Tensor, int]:
    """Positions, [3, L], of tokens [1, L] among which those of `media` are; and how far later ones
    are from their index."""
    grids: dict[str, list[tuple[int, int, int]]] = {"image": [], "video": []}
    for medium in media:
        if medium.kind in grids:
            grids[medium.kind].append(medium.grid)
    sounds = [medium.frames for medium in media if medium.kind == "audio"]
    seconds = [medium.seconds for medium in media if medium.kind == "video"]
    positions, shift = model.get_rope_index(
        tokens,
        image_grid_thw=torch.tensor(grids["image"]) if grids["image"] else None,
        video_grid_thw=torch.tensor(grids["video"]) if grids["video"] else None,
        attention_mask=torch.ones_like(tokens),
        audio_seqlens=torch.tensor(sounds) if sounds else None,
        second_per_grids=torch.tensor(seconds) if seconds else None,
    )
    return positions[:, 0].to(tokens.device), int(shift)
