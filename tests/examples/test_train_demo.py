"""The training of the small model: its scenes, its eye, and nets that compute what Wan's do."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from examples.train_demo import eye
from examples.train_demo.__main__ import train
from examples.train_demo.models import Parts, Reader, attend_plainly, make_tokenizer, make_vae
from examples.train_demo.muon import Muon, is_matrix, orthogonal
from examples.train_demo.scenes import COLOURS, SHAPES, draw_scene, is_kept, pictures, sentence
from examples.train_demo.unrolled import decode, encode, unroll


@pytest.mark.parametrize("size", [(96, 96), (128, 96), (192, 192)])
def test_the_eye_reads_what_was_drawn(size: tuple[int, int]) -> None:
    chance = random.Random(random.randrange(10**9))
    for _ in range(40):
        scene = draw_scene(chance, moving=False)
        picture = pictures(scene, *size)[0]
        seen = eye.look((picture + 0.03 * torch.randn_like(picture)).clamp(0, 1))
        assert (seen.shape, seen.colour, seen.background) == (
            scene.shape,
            scene.colour,
            scene.background,
        )


def test_the_eye_follows_what_moves() -> None:
    chance = random.Random(random.randrange(10**9))
    for _ in range(12):
        scene = draw_scene(chance, moving=True)
        assert eye.way(pictures(scene, 96, 96, 17)) == scene.motion


def test_an_empty_picture_shows_nothing() -> None:
    seen = eye.look(torch.full((3, 64, 64), 0.1))
    assert (seen.shape, seen.colour, seen.background) == (None, None, "black")


def test_training_never_sees_what_the_eye_judges_by() -> None:
    chance = random.Random(3)
    assert not any(is_kept(draw_scene(chance, moving=moving)) for moving in (True, False) * 50)
    assert all(is_kept(draw_scene(chance, moving=True, kept=True)) for _ in range(20))


def test_a_sentence_says_what_there_is_to_see() -> None:
    chance = random.Random(4)
    scene = draw_scene(chance, moving=True)
    plain = sentence(scene)
    assert {scene.colour, scene.shape, scene.background} <= set(plain.split())
    assert len({sentence(scene, chance) for _ in range(50)}) > 30
    words = set(sentence(scene, chance).replace(",", "").split())
    assert words & {*COLOURS, *SHAPES}


def test_unknown_words_become_letters() -> None:
    tokenizer = make_tokenizer()
    known = tokenizer("A RED circle")["input_ids"]
    assert known == tokenizer("a red circle")["input_ids"] and len(known) == 4
    strange = tokenizer("zyx")["input_ids"]
    assert len(strange) == 5 and tokenizer.unk_token_id not in strange


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_the_unrolled_vae_is_the_library_s(frames: int) -> None:
    torch.manual_seed(frames)
    vae = make_vae().eval()
    clips = torch.rand(2, 3, frames, 32, 48) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(clips).latent_dist.mean
        back = vae.decode(latents).sample
        unroll(vae)
        torch.testing.assert_close(encode(vae, clips)[0], latents, atol=1e-4, rtol=1e-4)
        unclamped = decode(vae, latents).clamp(-1, 1)
    torch.testing.assert_close(unclamped, back, atol=1e-4, rtol=1e-4)


def test_a_sentence_with_its_zeros_in_one_token_is_the_pipeline_s() -> None:
    parts = Parts.fresh(5)
    for module in (parts.transformer, parts.text_encoder):
        module.eval()
    said = ["a red circle", "a small green star moving left on a pink background"]
    latents = torch.randn(2, 16, 2, 6, 4)
    at = torch.tensor([300.0, 800.0])
    with torch.no_grad():
        tokens, scores = Reader(parts.tokenizer, parts.text_encoder)(said)
        length = tokens.shape[1] - 1
        padded = torch.cat([tokens[:, :length], tokens.new_zeros(2, 512 - length, 128)], dim=1)
        whole = parts.transformer(latents, at, padded).sample
        attend_plainly(parts.transformer).scores = scores
        ours = parts.transformer(latents, at, tokens).sample
    torch.testing.assert_close(ours, whole, atol=2e-5, rtol=1e-4)


def test_muon_steps_are_orthogonal_and_go_downhill() -> None:
    torch.manual_seed(6)
    values = torch.linalg.svdvals(orthogonal(torch.randn(3, 24, 40)))
    assert 0.5 < float(values.min()) and float(values.max()) < 1.4
    kernel = torch.nn.Conv2d(8, 12, 3)
    assert is_matrix(kernel.weight) and not is_matrix(kernel.bias)
    target, x = torch.randn(12, 8, 3, 3), torch.randn(64, 8, 3, 3)
    wanted = torch.nn.functional.conv2d(x, target)
    optimizer = Muon([kernel.weight])
    losses = []
    for step in range(120):
        loss = (kernel(x) - wanted).square().mean()
        kernel.zero_grad()
        loss.backward()
        optimizer.step(0.2 * (1 - step / 120))
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler has its own
def test_the_whole_training_leaves_a_model_that_diffusers_loads(tmp_path: Path) -> None:
    from diffusers import WanPipeline

    train(tmp_path / "demo", torch.device("cpu"), 0, 0.002, None)
    pipeline = WanPipeline.from_pretrained(tmp_path / "demo")
    for style in ("outline", "night"):
        path = tmp_path / "demo" / "adapters" / f"{style}.safetensors"
        assert path.stat().st_size < 300_000
        pipeline.load_lora_weights(path, adapter_name=style)
    frames = pipeline(
        "a red circle", height=32, width=48, num_frames=5, num_inference_steps=2, output_type="pt"
    ).frames
    assert frames.shape == (1, 5, 3, 32, 48)
