"""Samples to bytes of a sound file, in pieces as they come: the pieces are the file.

WAV and raw PCM are written here, the other formats by PyAV. Frames of a codec are cut from the
whole stream, never from a piece, so the bytes do not depend on how the samples came.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sgl_diffusion.base.errors import RequestError

Samples = NDArray[np.float32]

_ENDLESS = 0xFFFFFFFF
_STEP = 1024
_SLOWEST_STEP, _FASTEST_STEP = 0.5, 2.0  # what one filter changes without artefacts


@dataclass(frozen=True)
class Format:
    """`codec` and `container` are PyAV's names; without a codec the samples are written as they
    are."""

    media_type: str
    codec: str = ""
    container: str = ""
    layout: str = "flt"


FORMATS = {
    "wav": Format("audio/wav"),
    "pcm": Format("audio/pcm"),
    "mp3": Format("audio/mpeg", "libmp3lame", "mp3", "fltp"),
    "flac": Format("audio/flac", "flac", "flac", "s16"),
    "opus": Format("audio/ogg", "libopus", "ogg", "flt"),
    "aac": Format("audio/aac", "aac", "adts", "fltp"),
}


@cache
def can_make(name: str) -> bool:
    """Whether PyAV was built with the encoder."""
    codec = FORMATS[name].codec
    if not codec:
        return True
    import av

    try:
        av.codec.Codec(codec, "w")
    except ValueError:
        return False
    return True


def choose(name: str, *, fallback: bool, param: str) -> str:
    """The format that is made for `name`."""
    if name in FORMATS and can_make(name):
        return name
    if fallback:
        return "wav"
    made = ", ".join(known for known in FORMATS if can_make(known))
    raise RequestError(
        "This server does not make that format of sound.",
        hint=f"It makes {made}.",
        code="unsupported_format",
        param=param,
    )


def pcm16(samples: Samples) -> bytes:
    """Signed 16-bit samples, little-endian."""
    return (np.clip(samples, -1.0, 1.0) * 32767.0).round().astype("<i2").tobytes()


def wav_header(rate: int, size: int | None) -> bytes:
    """Of one channel with 16 bits; `size` in bytes, None for a stream whose end is not known."""
    data = _ENDLESS if size is None else size
    whole = _ENDLESS if size is None else size + 36
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", whole, b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16, b"data", data),
    )


class SoundFile:
    """One file under way: `add` samples, then `finish`; both return new bytes of it. `speed`
    changes the tempo and not the pitch. With `whole` the file is wanted at its end, with its true
    length."""

    def __init__(self, name: str, rate: int, *, speed: float = 1.0, whole: bool = False) -> None:
        self._format = FORMATS[name]
        self._rate = rate
        self._name = name
        self._whole = whole
        self._tempo = _Tempo(rate, speed) if speed != 1.0 else None
        self._encoder = _Encoder(self._format, rate) if self._format.codec else None
        self._held: list[bytes] = []
        self._begun = False

    def add(self, samples: Samples) -> bytes:
        fresh = samples if self._tempo is None else self._tempo.add(samples)
        return self._write(fresh)

    def finish(self) -> bytes:
        data = b""
        if self._tempo is not None:
            data += self._write(self._tempo.finish())
        if self._encoder is not None:
            data += self._encoder.finish()
        if self._name == "wav" and self._whole:
            body = b"".join(self._held)
            return wav_header(self._rate, len(body)) + body
        if self._name == "wav" and not self._begun:
            data = wav_header(self._rate, None) + data
        return data

    def _write(self, samples: Samples) -> bytes:
        if self._encoder is not None:
            return self._encoder.add(samples)
        data = pcm16(samples)
        if self._name == "wav" and self._whole:
            self._held.append(data)
            return b""
        if self._name == "wav" and not self._begun and data:
            self._begun = True
            return wav_header(self._rate, None) + data
        return data


def encode(samples: Samples, name: str, rate: int, *, speed: float = 1.0) -> bytes:
    """A whole file."""
    file = SoundFile(name, rate, speed=speed, whole=True)
    return file.add(samples) + file.finish()


class _Encoder:
    def __init__(self, kind: Format, rate: int) -> None:
        import av

        self._sink = _Sink()
        options = {"fflags": "+bitexact"}  # no serial number by chance
        self._file: Any = av.open(self._sink, "w", format=kind.container, options=options)
        self._stream = _stream(self._file, kind, rate)
        size = self._stream.codec_context.frame_size or None
        self._cut = av.AudioResampler(kind.layout, "mono", rate, frame_size=size)
        self._rate = rate
        self._at = 0

    def add(self, samples: Samples) -> bytes:
        if len(samples):
            for frame in self._cut.resample(_frame(samples, self._rate, self._at)):
                self._file.mux(self._stream.encode(frame))
            self._at += len(samples)
        return self._sink.take()

    def finish(self) -> bytes:
        for frame in self._cut.resample(None):
            self._file.mux(self._stream.encode(frame))
        self._file.mux(self._stream.encode(None))
        self._file.close()
        return self._sink.take()


def _stream(file: Any, kind: Format, rate: int) -> Any:
    stream = file.add_stream(kind.codec, rate=rate)
    stream.layout = "mono"
    stream.format = kind.layout
    stream.codec_context.open()
    return stream


class _Sink(io.RawIOBase):
    """What a muxer writes to when it must never go back."""

    def __init__(self) -> None:
        self._data: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._data.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        found = b"".join(self._data)
        self._data.clear()
        return found


class _Tempo:
    """Faster or slower speech at the same pitch."""

    def __init__(self, rate: int, speed: float) -> None:
        from av.filter import Graph

        self._graph: Any = Graph()
        nodes = [self._graph.add_abuffer(format="flt", sample_rate=rate, layout="mono")]
        nodes += [self._graph.add("atempo", f"{step:.6f}") for step in _steps(speed)]
        nodes += [
            self._graph.add("aformat", "sample_fmts=flt:channel_layouts=mono"),
            self._graph.add("abuffersink"),
        ]
        self._graph.link_nodes(*nodes).configure()
        self._rate = rate
        self._at = 0
        self._rest = np.zeros(0, np.float32)

    def add(self, samples: Samples) -> Samples:
        # In steps of one length: what the filters give depends on how they are fed.
        samples = np.concatenate([self._rest, samples])
        whole = len(samples) // _STEP * _STEP
        self._rest = samples[whole:]
        for at in range(0, whole, _STEP):
            self._push(samples[at : at + _STEP])
        return self._pull()

    def finish(self) -> Samples:
        if len(self._rest):
            self._push(self._rest)
        self._graph.push(None)
        return self._pull()

    def _push(self, samples: Samples) -> None:
        self._graph.push(_frame(samples, self._rate, self._at))
        self._at += len(samples)

    def _pull(self) -> Samples:
        import av

        found = []
        while True:
            try:
                found.append(self._graph.pull().to_ndarray()[0])
            except (BlockingIOError, av.error.EOFError):
                break
        return np.concatenate(found) if found else np.zeros(0, np.float32)


def _steps(speed: float) -> Iterator[float]:
    while speed > _FASTEST_STEP:
        yield _FASTEST_STEP
        speed /= _FASTEST_STEP
    while speed < _SLOWEST_STEP:
        yield _SLOWEST_STEP
        speed /= _SLOWEST_STEP
    yield speed


def _frame(samples: Samples, rate: int, at: int) -> Any:
    from fractions import Fraction

    import av

    data = np.ascontiguousarray(samples, np.float32)[None]
    frame = av.AudioFrame.from_ndarray(data, format="flt", layout="mono")
    frame.sample_rate = rate
    frame.pts = at
    frame.time_base = Fraction(1, rate)
    return frame
