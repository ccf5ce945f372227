"""Sound files: what they hold, and that pieces make the same bytes as the whole."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.server.omni import sound
from sgl_diffusion.server.omni.sound import FORMATS, SoundFile, choose, encode, pcm16

RATE = 24_000
CODECS = {"wav": "pcm_s16le", "mp3": "mp3", "flac": "flac", "opus": "opus", "aac": "aac"}


def tone(seconds: float = 2.0) -> np.ndarray:
    at = np.arange(int(seconds * RATE)) / RATE
    return (0.5 * np.sin(2 * np.pi * 440 * at)).astype(np.float32)


def decoded(data: bytes) -> tuple[str, np.ndarray]:
    with av.open(io.BytesIO(data)) as file:
        name = file.streams.audio[0].codec_context.codec.name
        resampler = av.AudioResampler("flt", "mono", RATE)
        pieces = [p.to_ndarray()[0] for f in file.decode(audio=0) for p in resampler.resample(f)]
    return name, np.concatenate(pieces)


def pitch(samples: np.ndarray) -> float:
    middle = samples[len(samples) // 4 : -len(samples) // 4]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    return float(np.argmax(spectrum) * RATE / len(middle))


@pytest.mark.parametrize("speed", [1.0, 0.3, 1.7, 4.0])
@pytest.mark.parametrize("name", FORMATS)
def test_pieces_are_the_file(name: str, speed: float) -> None:
    samples = tone()
    whole = encode(samples, name, RATE, speed=speed)
    file = SoundFile(name, RATE, speed=speed)
    cuts = [0, 7, 100, 5000, 5001, 30_000, len(samples) - 1]
    pieces = [file.add(piece) for piece in np.split(samples, cuts)]
    pieces.append(file.finish())
    head = 44 if name == "wav" else 0  # the length is not known before the end
    assert b"".join(pieces)[head:] == whole[head:]


@pytest.mark.parametrize("name", CODECS)
def test_the_file_holds_the_sound(name: str) -> None:
    codec, samples = decoded(encode(tone(), name, RATE))
    assert CODECS[name] in codec
    assert 1.99 < len(samples) / RATE < 2.15
    assert abs(pitch(samples) - 440) < 3
    loud = samples[RATE // 2 : RATE]
    assert abs(float(np.abs(loud).max()) - 0.5) < 0.05


def test_a_stream_of_wav_can_be_read() -> None:
    file = SoundFile("wav", RATE)
    codec, samples = decoded(file.add(tone()) + file.finish())
    assert codec == "pcm_s16le" and np.abs(samples - tone()).max() < 1e-4
    assert SoundFile("wav", RATE).finish()[:4] == b"RIFF"


@pytest.mark.parametrize("speed", [0.25, 0.8, 3.0])
def test_speed_changes_the_length_and_not_the_pitch(speed: float) -> None:
    _, samples = decoded(encode(tone(3.0), "wav", RATE, speed=speed))
    assert len(samples) / RATE == pytest.approx(3.0 / speed, rel=0.05)
    assert abs(pitch(samples) - 440) < 6


def test_loud_samples_are_clipped_and_not_wrapped() -> None:
    values = np.frombuffer(pcm16(np.array([2.0, -2.0, 0.0], np.float32)), "<i2")
    assert values.tolist() == [32767, -32767, 0]


def test_a_format_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sound, "can_make", lambda name: name != "opus")
    for name in ("exe", "opus"):
        with pytest.raises(RequestError, match="It makes wav, pcm, mp3, flac, aac") as told:
            choose(name, fallback=False, param="response_format")
        assert told.value.code == "unsupported_format"
        assert choose(name, fallback=True, param="response_format") == "wav"
