"""Qwen2.5's speech: the sound of the library's whole decode, however it is cut."""

from __future__ import annotations

import functools
import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from sgl_diffusion.ar.token2wav import Token2Wav
from sgl_diffusion.ar.voices import read_voices
from sgl_diffusion.base.chat import ChatParams, Speech
from sgl_diffusion.base.errors import SetupError
from tests.ar.chats import ask, open_worker, oracle, run, submit

CODES = 40
# The tiny talker's codes that its decoder has no vectors for.
_NO_CODES = [[code] for code in range(195, 200)]


@pytest.fixture(scope="module")
def omni(tiny_qwen25_omni: Path) -> Any:
    from transformers import Qwen2_5OmniForConditionalGeneration

    return Qwen2_5OmniForConditionalGeneration.from_pretrained(tiny_qwen25_omni).eval()


@pytest.fixture(scope="module")
def worker(tiny_qwen25_omni: Path) -> Any:
    return open_worker(tiny_qwen25_omni, rows=4)


def whole(omni: Any, folder: Path, codes: Tensor, voice: str, seed: int) -> Tensor:
    """The library's own decode."""
    told = read_voices(folder)[voice]
    torch.manual_seed(seed)
    with torch.inference_mode():
        sound: Tensor = omni.token2wav(codes, told.manner, told.sample)
    return sound.reshape(-1)


def cut(
    omni: Any, folder: Path, codes: Tensor, pieces: list[int], look_ahead: int | None = None
) -> list[Tensor]:
    stream = Token2Wav(omni.token2wav, read_voices(folder), look_ahead).stream("Ethan", 7)
    *before, last = codes.split(pieces, dim=1)
    return [*(stream.add(piece) for piece in before), stream.add(last, last=True)]


@pytest.mark.parametrize("pieces", [(112,), (8, 16, 32, 48, 8, 0), (13, 99)])
def test_any_cut_gives_the_whole_decode(
    omni: Any, tiny_qwen25_omni: Path, pieces: tuple[int, ...]
) -> None:
    codes = torch.randint(0, 192, (1, 112), generator=torch.Generator().manual_seed(0))
    expected = whole(omni, tiny_qwen25_omni, codes, "Ethan", 7)
    sounds = cut(omni, tiny_qwen25_omni, codes, list(pieces))
    if len(pieces) > 3:
        assert any(len(sound) for sound in sounds[:-1]), "sound before the end"
    sound = torch.cat(sounds)
    assert sound.shape == expected.shape == (112 * 480,)
    assert float(expected.std()) > 1e-3
    torch.testing.assert_close(sound, expected, atol=1e-4, rtol=0)


def test_looking_less_far_ahead_brings_sound_sooner(omni: Any, tiny_qwen25_omni: Path) -> None:
    codes = torch.randint(0, 192, (1, 40), generator=torch.Generator().manual_seed(0))
    first = {}
    for look_ahead in (0, 3):
        sounds = cut(omni, tiny_qwen25_omni, codes, [*[4] * 10, 0], look_ahead)
        first[look_ahead] = next(i for i, sound in enumerate(sounds) if len(sound))
        (together,) = cut(omni, tiny_qwen25_omni, codes, [40], look_ahead)
        torch.testing.assert_close(torch.cat(sounds), together, atol=1e-4, rtol=0)
    assert first[0] < first[3] < 10


def test_a_piece_costs_what_is_new_in_it(omni: Any, tiny_qwen25_omni: Path) -> None:
    """Beyond that, layers are given what they look at, once for each piece."""
    given: Counter[Any] = Counter()
    dit, waves = omni.token2wav.code2wav_dit_model, omni.token2wav.code2wav_bigvgan_model
    layers = list(dit.transformer_blocks)
    convolutions = [each for each in waves.modules() if isinstance(each, torch.nn.Conv1d)]

    def count(dim: int) -> Any:
        return lambda module, told: given.update({module: told[0].shape[dim]})

    hooks = [each.register_forward_pre_hook(count(1)) for each in layers]
    hooks += [each.register_forward_pre_hook(count(2)) for each in convolutions]
    codes = torch.randint(0, 192, (1, 96), generator=torch.Generator().manual_seed(0))
    try:
        whole(omni, tiny_qwen25_omni, codes, "Ethan", 7)
        once = dict(given)
        given.clear()
        cut(omni, tiny_qwen25_omni, codes, [8] * 12)
    finally:
        for hook in hooks:
            hook.remove()
    for layer in layers:
        sees = layer.look_backward_block + layer.look_ahead_block
        assert once[layer] == 36 * 96 * 2 and sees < 2
        assert given[layer] <= once[layer] + 36 * 12 * sees * dit.block_size
    for convolution in convolutions:
        (padding,) = convolution.padding
        assert given[convolution] <= once[convolution] + 12 * 2 * padding


@contextmanager
def whole_prompts(talker: Any) -> Iterator[None]:
    """In 5.23 the library's `generate` drops a mask of ones, and the talker leaves out the codes
    that begin a speech, and the positions of media, where it gets no mask."""
    forward = talker.forward

    @functools.wraps(forward)
    def masked(**given: Any) -> Any:
        fresh = given.get("inputs_embeds")
        fresh = given["input_ids"] if fresh is None else fresh
        length = given["past_key_values"].get_seq_length() + fresh.shape[1]
        return forward(**given | {"attention_mask": torch.ones(1, length, dtype=torch.long)})

    talker.forward = masked
    try:
        yield
    finally:
        talker.forward = forward


def truth(omni: Any, folder: Path, params: ChatParams, voice: str) -> Tensor:
    """The library's own text and sound, in its own order."""
    inputs = oracle(folder).inputs(params)
    for name in ("pixel_values", "pixel_values_videos"):  # the talker's `generate` refuses them
        if name in inputs:
            inputs[f"thinker_{name}"] = inputs.pop(name)
    torch.manual_seed(params.sampling.seed)
    with whole_prompts(omni.talker):
        _, sound = omni.generate(
            **inputs,
            speaker=voice,
            thinker_max_new_tokens=params.sampling.max_tokens,
            thinker_do_sample=False,
            thinker_eos_token_id=omni.thinker.generation_config.eos_token_id,
            talker_max_new_tokens=CODES,
            talker_do_sample=False,
            talker_eos_token_id=[192, 194],
            talker_bad_words_ids=_NO_CODES,
        )
    found: Tensor = sound.reshape(-1)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kinds", [(), ("image", "audio", "video")], ids=["text", "media"])
def test_sound_is_that_of_the_model(
    omni: Any, worker: Any, tiny_qwen25_omni: Path, media: dict[str, Path], kinds: tuple[str, ...]
) -> None:
    chat, outbox = worker
    speech = Speech(voice="Ethan", temperature=0.0, max_frames=CODES)
    params = ask("a red fox", *(media[k] for k in kinds), speech=speech, max_tokens=7, seed=3)
    name = f"whole {kinds}"
    submit(chat, name, params)
    run(chat)
    assert name not in outbox.errors
    (sound,) = outbox.outputs[name]
    expected = truth(omni, tiny_qwen25_omni, params, "Ethan")
    assert sound.shape == expected.shape and len(sound) > 4 * 480
    torch.testing.assert_close(sound, expected, atol=1e-4, rtol=0)


def test_streams_company_voices_and_seeds(worker: Any) -> None:
    chat, outbox = worker
    drawn = Speech(voice="Chelsie", max_frames=30)
    wish = ask("the sea", speech=drawn, max_tokens=6, seed=5)
    submit(chat, "alone", wish)
    run(chat)
    for name in ("x", "among", "y"):
        submit(chat, name, wish if name == "among" else ask(name, speech=drawn, max_tokens=5))
    stream = ask("the sea", speech=drawn, max_tokens=6, seed=5, stream=True)
    submit(chat, "stream", stream)
    submit(chat, "other", ask("the sea", speech=drawn, max_tokens=6, seed=6))
    run(chat)
    (alone,), (among,), (other,) = (outbox.outputs[n] for n in ("alone", "among", "other"))
    torch.testing.assert_close(among, alone, atol=1e-4, rtol=0)
    pieces = [arrays[0] for meta, arrays in outbox.parts["stream"] if "sound" in meta]
    torch.testing.assert_close(torch.cat(pieces), alone, atol=1e-4, rtol=0)
    assert other.shape != alone.shape or not torch.allclose(other, alone, atol=1e-3)


def test_a_script_is_read_aloud_as_if_it_were_written(worker: Any) -> None:
    """The answer that the model writes by itself sounds the same when it is given."""
    chat, outbox = worker
    speech = Speech(voice="Ethan", temperature=0.0, max_frames=CODES)
    submit(chat, "written", ask("a bird", speech=speech, max_tokens=6, seed=2))
    run(chat)
    (choice,) = outbox.meta["written"]["choices"]
    params = ask("a bird", speech=speech, script="these tokens", seed=2)
    question = {
        "params": msgspec.to_builtins(params),
        "tokens": chat.parts["thinker"]._reader.tokens(params.messages),
        "script": choice["tokens"][:-1],  # the last one of what was cut off is not said
    }
    chat.feed("given", {"stage": "thinker", "told": question}, [])
    run(chat)
    (given,) = outbox.meta["given"]["choices"]
    assert given["tokens"] == choice["tokens"][:-1]
    (one,), (other,) = outbox.outputs["written"], outbox.outputs["given"]
    assert len(one) > 480
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_voices_are_read_from_plain_tensors_only(tiny_qwen25_omni: Path, tmp_path: Path) -> None:
    assert list(read_voices(tiny_qwen25_omni)) == ["Chelsie", "Ethan"]
    with pytest.raises(SetupError, match="has no spk_dict"):
        read_voices(tmp_path)

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "spk_dict.pt").write_bytes(pickle.dumps({"Ethan": Evil()}))
    with pytest.raises(SetupError, match="cannot be read"):
        read_voices(tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.save({"Ethan": {"bos_token": 1, "cond": torch.ones(2), "ref_mel": 3}}, tmp_path / "v")
    (tmp_path / "v").rename(tmp_path / "spk_dict.pt")
    with pytest.raises(SetupError, match="cannot be read"):
        read_voices(tmp_path)
