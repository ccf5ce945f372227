"""What does not fit into the memory is refused, with what would fit."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.footprint import Footprint, Shown
from sgl_diffusion.base.params import ModelCard, ResolvedParams, SamplingDefaults, SamplingParams

# 1 kB for each cell of a step, 2 kB for each pixel of a chunk: 8x8 pixels are a cell.
FOOTPRINT = Footprint(
    room=2 * 10**9,
    text=10_000_000.0,
    condition=1_000_000.0,
    shown=Shown(fixed=5_000_000.0, pixel=10.0, clip_pixel=1.0),
    shown_kept=Shown(fixed=100.0, clip_pixel=2.0),
    shown_step=1_000_000.0,
    step_row=50_000_000.0,
    step_cell=1000.0,
    still_pixel=1000.0,
    clip_pixel=2000.0,
    clip_kept_pixel=500.0,
    row_cell=100.0,
    cell_pixels=64.0,
    frames_per_cell=4,
)
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
    edits="native",
    max_images=4,
    masks=True,
    footprint=FOOTPRINT,
)
PIXELS = 832 * 480
CELLS = 21 * PIXELS / 64


def resolve(card: ModelCard = CARD, *, video: bool = True, **wish: object) -> ResolvedParams:
    return card.resolve(SamplingParams(prompt="a cat", **wish), video=video)  # type: ignore[arg-type]


def with_room(room: int) -> ModelCard:
    return dataclasses.replace(CARD, footprint=dataclasses.replace(FOOTPRINT, room=room))


def test_a_job_takes_what_it_keeps_and_its_largest_unit() -> None:
    params = resolve(guidance_scale=1.0)
    assert FOOTPRINT.cells(params) == CELLS
    assert FOOTPRINT.kept(params) == 1e6 + 100 * CELLS
    assert FOOTPRINT.step_bytes(params) == 50e6 + 1000 * CELLS
    assert FOOTPRINT.decode_bytes(params) == 2000 * PIXELS
    assert FOOTPRINT.decoding_kept(params) == 500 * PIXELS
    frames = 3 * PIXELS * 81
    assert FOOTPRINT.frames(params) == frames
    largest = FOOTPRINT.decode_bytes(params) + frames
    assert FOOTPRINT.job_bytes(params) == FOOTPRINT.kept(params) + largest


def test_guidance_is_another_row_and_another_prompt() -> None:
    plain, guided = resolve(guidance_scale=1.0), resolve(guidance_scale=5.0)
    assert FOOTPRINT.step_bytes(guided) == 2 * FOOTPRINT.step_bytes(plain)
    assert FOOTPRINT.kept(guided) - FOOTPRINT.kept(plain) == FOOTPRINT.condition


def test_pictures_are_counted_one_by_one() -> None:
    none = resolve(video=False, guidance_scale=1.0)
    two = resolve(video=False, guidance_scale=1.0, images=("1", "2"))
    assert FOOTPRINT.kept(two) - FOOTPRINT.kept(none) == 2 * (100 + 2 * PIXELS)
    assert FOOTPRINT.step_bytes(two) - FOOTPRINT.step_bytes(none) == 2 * 1e6
    assert FOOTPRINT.encode_bytes(none) == 10e6
    assert FOOTPRINT.encode_bytes(two) == 2 * (5e6 + 11 * PIXELS)
    # With a mask the VAE encodes the first one, too.
    masked = resolve(video=False, guidance_scale=1.0, images=("1", "2"), mask="m")
    assert FOOTPRINT.encode_bytes(masked) == 1000 * PIXELS


def test_one_picture_is_decoded_as_a_still() -> None:
    assert FOOTPRINT.decode_bytes(resolve(video=False)) == 1000 * PIXELS
    assert FOOTPRINT.decoding_kept(resolve(video=False)) == 0.0


def test_what_is_too_large_is_refused_with_what_fits() -> None:
    with pytest.raises(RequestError) as caught:
        resolve(width=1280, height=720)
    error = caught.value
    assert (error.code, error.param) == ("request_too_large", "size")
    assert error.message.startswith(
        "1280x720, 81 frames needs about 2.1 GB beside the model, and 2.0 GB are there."
    )
    size, frames = error.hint.removeprefix("Ask for ").removesuffix(".").split(", or ")
    width, height = map(int, size.removeprefix("size ").split("x"))
    assert resolve(width=width, height=height)
    with pytest.raises(RequestError, match="needs about"):
        resolve(width=width + 64, height=height + 64)
    assert resolve(width=1280, height=720, num_frames=int(frames.removesuffix(" frames")))


def test_fewer_outputs_may_be_enough() -> None:
    card = with_room(430_000_000)
    with pytest.raises(RequestError, match="10 outputs needs about") as caught:
        resolve(card, video=False, num_outputs=10, width=640, height=640)
    count = int(caught.value.hint.removeprefix("Ask for ").split(" ")[0])
    assert resolve(card, video=False, num_outputs=count, width=640, height=640)


def test_where_nothing_fits_the_operator_has_to_act() -> None:
    with pytest.raises(RequestError) as caught:
        resolve(with_room(1000), video=False, width=16, height=16)
    assert "--memory-budget" in caught.value.hint


def test_nothing_is_refused_where_nobody_counted() -> None:
    assert resolve(dataclasses.replace(CARD, footprint=None), width=1280, height=720)


def test_tiles_take_less_at_a_time() -> None:
    tiled = dataclasses.replace(FOOTPRINT, tile_edge=256)
    still, clip = resolve(video=False), resolve()
    assert tiled.decode_bytes(still) == 1000 * 256**2 + 30 * PIXELS
    kept = 500 * PIXELS * 16 / 9
    assert tiled.decoding_kept(clip) == pytest.approx(kept)
    work = (2000 * PIXELS - kept) * 256**2 / PIXELS
    assert tiled.decode_bytes(clip) == pytest.approx(kept + work + 4 * 30 * PIXELS)
    small = resolve(video=False, width=256, height=256)
    assert tiled.decode_bytes(small) == FOOTPRINT.decode_bytes(small)


def test_a_footprint_crosses_the_wire() -> None:
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(dataclasses.asdict(CARD)))
    assert msgspec.convert(sent, ModelCard) == CARD
