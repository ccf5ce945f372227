"""Tokens through the layers of a decoder one by one give what its own modules give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sgl_diffusion.ar.kv import KvShape, KvSlab
from sgl_diffusion.ar.tokenwise import Tokenwise, tokenwise

ROWS, TOKENS = 3, 5


class Calls(TorchFunctionMode):
    """Counts what Python calls of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Kept:
    """Implements `Memory` with nothing to spare."""

    def __init__(self) -> None:
        self.parts: dict[int, Tensor] = {}

    def put(self, layer: int, fresh: Tensor) -> tuple[Tensor, Tensor]:
        before = self.parts.get(layer, fresh[..., :0, :])
        keys, values = self.parts[layer] = torch.cat([before, fresh], dim=3)
        return keys, values


@pytest.fixture(params=["thinker", "talker", "code predictor", "thinker 2.5", "talker 2.5"])
def decoder(request: pytest.FixtureRequest) -> Any:
    from transformers import Qwen2_5OmniForConditionalGeneration as Qwen25
    from transformers import Qwen3OmniMoeForConditionalGeneration as Qwen3

    name = request.param
    if name.endswith("2.5"):
        model = Qwen25.from_pretrained(request.getfixturevalue("tiny_qwen25_omni"))
    else:
        model = Qwen3.from_pretrained(request.getfixturevalue("tiny_qwen3_omni"))
    if name.startswith("thinker"):
        return model.thinker.model.language_model
    return model.talker.code_predictor.model if "code" in name else model.talker.model


def inputs(decoder: Any) -> tuple[Tensor, Tensor]:
    width = decoder.norm.weight.shape[0]
    vectors = torch.randn(ROWS, TOKENS, width, generator=torch.Generator().manual_seed(0))
    places = torch.arange(TOKENS).expand(ROWS, -1)
    return vectors, places


def is_predictor(decoder: Any) -> bool:
    return "Predictor" in type(decoder).__name__


@torch.inference_mode()
def test_tokens_in_any_portions_are_those_of_the_modules(decoder: Any) -> None:
    vectors, places = inputs(decoder)
    truth = decoder(inputs_embeds=vectors, position_ids=places).last_hidden_state
    few, seen = Tokenwise(decoder), torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    for cuts in ((TOKENS,), (2, 3), (1,) * TOKENS):
        kept, found, start = Kept(), [], 0
        for count in cuts:
            end = start + count
            where = places[:, start:end]
            turned = where if is_predictor(decoder) else where.expand(3, -1, -1)
            mask = seen[start:end, :end].expand(ROWS, 1, -1, -1)
            found.append(few(vectors[:, start:end], turned, kept, mask))
            start = end
        torch.testing.assert_close(torch.cat(found, 1), truth, rtol=1e-5, atol=1e-5)
    # The modules have the same weights as before.
    again = decoder(inputs_embeds=vectors, position_ids=places).last_hidden_state
    torch.testing.assert_close(again, truth, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_token_alone_takes_fewer_calls(decoder: Any) -> None:
    """Which is what it costs; in a cache that knows no other token, both see the same."""
    vectors, _ = inputs(decoder)
    place = torch.zeros((1, 1) if is_predictor(decoder) else (3, 1, 1), dtype=torch.long)
    alone = vectors[:1, :1]
    calls, found = [], []
    for run in (decoder, Tokenwise(decoder)):
        slab = KvSlab(KvShape.of(decoder), ROWS)
        slab.take()
        mask = slab.decode([True])
        with Calls() as counted:
            if run is decoder:
                states = run(
                    inputs_embeds=alone,
                    position_ids=place,
                    attention_mask=mask,
                    past_key_values=slab,
                    use_cache=True,
                ).last_hidden_state
            else:
                states = run(alone, place, slab, mask)
        calls.append(counted.count)
        found.append(states)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert calls[1] < 0.6 * calls[0], calls


def test_what_is_recorded_stays_with_the_modules(tiny_qwen3_omni: Path) -> None:
    from transformers import Qwen3OmniMoeForConditionalGeneration as Qwen3

    talker = Qwen3.from_pretrained(tiny_qwen3_omni).talker.model
    assert tokenwise(talker, lambda make: pytest.fail("recorded")) is None
    assert tokenwise(talker.to("meta"), None) is None
    assert tokenwise(Qwen3.from_pretrained(tiny_qwen3_omni).talker.model, None) is not None


def test_small_layers_are_for_one_thread(
    tiny_qwen3_omni: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen3OmniMoeForConditionalGeneration as Qwen3

    decoder = Qwen3.from_pretrained(tiny_qwen3_omni).talker.code_predictor.model
    before, seen = torch.get_num_threads(), set()

    class Watching(Kept):
        def put(self, layer: int, fresh: Tensor) -> tuple[Tensor, Tensor]:
            seen.add(torch.get_num_threads())
            return super().put(layer, fresh)

    vectors, places = inputs(decoder)
    mask = torch.ones(ROWS, 1, TOKENS, TOKENS, dtype=torch.bool)
    torch.set_num_threads(3)
    try:
        Tokenwise(decoder)(vectors, places, Watching(), mask)
        assert seen == {1} and torch.get_num_threads() == 3
        seen.clear()
        monkeypatch.setattr("sgl_diffusion.ar.tokenwise._FOR_ALL_THREADS", 1024)
        Tokenwise(decoder)(vectors, places, Watching(), mask)
        assert seen == {3}
    finally:
        torch.set_num_threads(before)
