"""Files of sound, pictures and films to arrays, as the models hear and see them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sgl_diffusion.base.errors import RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

HEARING_RATE = 16_000
FRAMES_PER_SECOND = 2.0
MAX_FRAMES = 256
MAX_SOUND_SECONDS = 1800
_LEAST_SAMPLES = HEARING_RATE // 10


def read_picture(path: Path) -> Image:
    """RGB, upright."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except Exception as error:
        raise _unreadable("image") from error


def read_sound(path: Path) -> NDArray[np.float32]:
    """The first track: one channel at 16 kHz, in [-1, 1]."""
    import av

    pieces: list[NDArray[np.float32]] = []
    length = 0
    try:
        with av.open(str(path)) as file:
            resampler = av.AudioResampler(format="flt", layout="mono", rate=HEARING_RATE)
            for frame in file.decode(audio=0):
                for piece in resampler.resample(frame):
                    pieces.append(piece.to_ndarray()[0])
                    length += len(pieces[-1])
                if length > MAX_SOUND_SECONDS * HEARING_RATE:
                    break
            pieces += [piece.to_ndarray()[0] for piece in resampler.resample(None)]
    except Exception as error:
        raise _unreadable("audio") from error
    if length > MAX_SOUND_SECONDS * HEARING_RATE:
        raise RequestError(
            f"The audio is longer than {MAX_SOUND_SECONDS // 60} minutes.",
            code="media_too_long",
            param="messages",
        )
    sound = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    if len(sound) < _LEAST_SAMPLES:
        raise RequestError(
            "The audio is shorter than a tenth of a second.", code="media_empty", param="messages"
        )
    return np.ascontiguousarray(sound, dtype=np.float32)


def read_film(path: Path) -> tuple[list[Image], float]:
    """Frames evenly spread over the film, an even number of them, and how many per second."""
    import av

    frames: list[tuple[float, Image]] = []
    try:
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            due = 0.0
            for frame in file.decode(stream):
                time = len(frames) / FRAMES_PER_SECOND if frame.time is None else frame.time
                if time + 1e-6 >= due:
                    frames.append((time, frame.to_image()))
                    due = len(frames) / FRAMES_PER_SECOND
                if len(frames) > MAX_FRAMES:
                    break
    except Exception as error:
        raise _unreadable("video") from error
    if not frames:
        raise RequestError("The video has no frames.", code="media_empty", param="messages")
    if len(frames) > MAX_FRAMES:
        raise RequestError(
            f"The video is longer than {MAX_FRAMES / FRAMES_PER_SECOND:.0f} seconds.",
            code="media_too_long",
            param="messages",
        )
    if len(frames) % 2:
        frames.append(frames[-1])
    return [picture for _, picture in frames], FRAMES_PER_SECOND


def _unreadable(kind: str) -> RequestError:
    return RequestError(
        f"A file of the request cannot be read as {kind}.",
        hint="Send a common format: PNG or JPEG, WAV or MP3, MP4.",
        code=f"invalid_{kind}",
        param="messages",
    )
