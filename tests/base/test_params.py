"""What a wish becomes, and how a wrong one is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from sgl_diffusion.base.checks import MAX_SEED
from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.params import ModelCard, SamplingDefaults, SamplingParams

CARD = ModelCard(
    name="m",
    path="m",
    family="wan",
    pipeline_class="WanPipeline",
    backend="native",
    tasks=("T2V", "T2I"),
    defaults=SamplingDefaults(
        width=832, height=480, num_frames=81, num_inference_steps=50, guidance_scale=5.0
    ),
)


def test_defaults_come_from_the_card() -> None:
    params = CARD.resolve(SamplingParams(prompt="a cat"), video=True)
    assert (params.width, params.height, params.num_frames, params.fps) == (832, 480, 81, 16)
    assert (params.num_inference_steps, params.guidance_scale) == (50, 5.0)
    assert params.seeds == (42,) and params.guided


def test_an_image_is_one_frame_whatever_the_default() -> None:
    assert CARD.resolve(SamplingParams(prompt="a"), video=False).num_frames == 1


@pytest.mark.parametrize(
    ("asked", "made"), [(1, 1), (4, 5), (5, 5), (16, 17), (24, 25), (80, 81), (241, 241)]
)
def test_frames_are_rounded_as_diffusers_does(asked: int, made: int) -> None:
    assert CARD.round_frames(asked) == made


def test_image_i_uses_seed_plus_i_and_a_list_is_taken_as_it_is() -> None:
    assert CARD.resolve(SamplingParams(prompt="a", num_outputs=3, seed=7), video=False).seeds == (
        7,
        8,
        9,
    )
    wish = SamplingParams(prompt="a", num_outputs=2, seed=(5, 1))
    assert CARD.resolve(wish, video=False).seeds == (5, 1)
    wish = SamplingParams(prompt="a", num_outputs=2, seed=MAX_SEED)
    assert CARD.resolve(wish, video=False).seeds == (MAX_SEED, 0)


@pytest.mark.parametrize(
    ("wish", "code", "param"),
    [
        ({"prompt": "  "}, "prompt_empty", "prompt"),
        ({"prompt": "x" * 32_001}, "prompt_too_long", "prompt"),
        ({"negative_prompt": "x" * 32_001}, "prompt_too_long", "negative_prompt"),
        ({"prompt": "a\udcff"}, "invalid_unicode", "prompt"),
        ({"width": 1000}, "invalid_size", "width"),
        ({"height": 8}, "invalid_size", "height"),
        ({"height": 5000}, "invalid_size", "height"),
        ({"width": -16}, "invalid_size", "width"),
        ({"width": 0}, "invalid_size", "width"),
        ({"num_frames": 0}, "out_of_range", "num_frames"),
        ({"num_frames": 10**7}, "out_of_range", "num_frames"),
        ({"fps": 0}, "out_of_range", "fps"),
        ({"fps": 1000}, "out_of_range", "fps"),
        ({"num_inference_steps": 0}, "out_of_range", "num_inference_steps"),
        ({"num_inference_steps": 100_000}, "out_of_range", "num_inference_steps"),
        ({"guidance_scale": math.nan}, "not_finite", "guidance_scale"),
        ({"guidance_scale": math.inf}, "not_finite", "guidance_scale"),
        ({"guidance_scale": 1000.0}, "out_of_range", "guidance_scale"),
        ({"flow_shift": 0.0}, "out_of_range", "flow_shift"),
        ({"guidance_start": -0.1}, "out_of_range", "guidance_start"),
        ({"guidance_start": 0.5, "guidance_stop": 0.5}, "conflicting_parameters", "guidance_stop"),
        ({"cfg_gate_step": 1.1}, "out_of_range", "cfg_gate_step"),
        ({"cfg_gate_step": math.nan}, "not_finite", "cfg_gate_step"),
        ({"max_sequence_length": 513}, "out_of_range", "max_sequence_length"),
        ({"num_outputs": 0}, "out_of_range", "n"),
        ({"num_outputs": 11}, "out_of_range", "n"),
        ({"seed": -1}, "out_of_range", "seed"),
        ({"seed": 2**63}, "out_of_range", "seed"),
        ({"seed": 10**5000}, "out_of_range", "seed"),
        ({"seed": (1, 2)}, "mismatched_lengths", "seed"),
    ],
)
def test_a_wrong_wish_names_the_argument(wish: dict[str, object], code: str, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        CARD.resolve(SamplingParams(**{"prompt": "a", **wish}), video=True)  # type: ignore[arg-type]
    assert (caught.value.code, caught.value.param) == (code, param)


@pytest.mark.parametrize(
    ("width", "hint"),
    [(1000, "992 or 1008"), (8, "16"), (5000, "4096"), (17, "16 or 32"), (4090, "4080 or 4096")],
)
def test_a_wrong_size_names_the_nearest(width: int, hint: str) -> None:
    with pytest.raises(RequestError) as caught:
        CARD.resolve(SamplingParams(prompt="a", width=width), video=True)
    assert caught.value.hint == f"Nearest: {hint}."


@pytest.mark.parametrize("param", ["guidance_start", "guidance_stop", "cfg_gate_step"])
def test_the_fallback_knows_no_single_steps(param: str) -> None:
    card = replace(CARD, backend="diffusers")
    with pytest.raises(RequestError, match=f"takes no {param} as it is served"):
        card.resolve(SamplingParams(prompt="a", **{param: 0.5}), video=True)  # type: ignore[arg-type]


def test_a_model_of_images_refuses_videos() -> None:
    import dataclasses

    card = dataclasses.replace(CARD, tasks=("T2I",))
    with pytest.raises(RequestError, match="makes images only"):
        card.resolve(SamplingParams(prompt="a"), video=True)


def test_all_outputs_together_have_a_limit() -> None:
    large = {"prompt": "a", "width": 4096, "height": 4096}
    CARD.resolve(SamplingParams(**large, num_outputs=10), video=False)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="2 x 9 frames of 4096x4096 are 302 million") as caught:
        CARD.resolve(SamplingParams(**large, num_outputs=2, num_frames=9), video=True)  # type: ignore[arg-type]
    assert caught.value.code == "request_too_large"


@pytest.mark.parametrize(
    ("scale", "true_scale", "offset", "guides"),
    [
        (5.0, None, 0.0, True),
        (1.0, None, 0.0, False),
        (0.0, None, 1.0, False),
        (4.0, None, 1.0, True),
        (3.5, 1.0, 0.0, False),  # a scale that the model reads, and no second branch
        (1.0, 4.0, 0.0, True),
    ],
)
def test_whether_a_model_guides_by_default(
    scale: float, true_scale: float | None, offset: float, guides: bool
) -> None:
    defaults = replace(CARD.defaults, guidance_scale=scale, true_cfg_scale=true_scale)
    card = replace(CARD, defaults=defaults, guidance_offset=offset)
    assert card.guides is guides
    assert card.resolve(SamplingParams(prompt="a"), video=False).guided is guides
