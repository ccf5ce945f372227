"""Files of sound, pictures and films to arrays, as the models hear and see them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
_FRAME_PIXELS = 768 * 28 * 28  # what the models see of a frame at most
_LARGEST_FRAME = 4096 * 4096
# Other formats can name files and addresses that would be opened, too, and old ones are the ones
# with holes.
_FORMATS = "wav", "mp3", "flac", "ogg", "aac", "mov", "mp4", "m4a", "matroska", "webm"
_CODECS = (
    *("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4"),
    *("aac", "mp3", "mp3float", "flac", "opus", "libopus", "vorbis", "libvorbis"),
    *("pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le", "pcm_s16be"),
)
_SAFE = {
    "protocol_whitelist": "file",
    "format_whitelist": ",".join(_FORMATS),
    "codec_whitelist": ",".join(_CODECS),
}


def read_picture(path: Path) -> Image:
    """RGB, upright."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except Exception as error:
        raise _unreadable("image") from error


def read_sound(path: Path) -> NDArray[np.float32]:
    """The first track: one channel at 16 kHz, in [-1, 1]. A `.npy` file holds it as it is."""
    if path.suffix == ".npy":
        sound: NDArray[np.float32] = np.load(path, allow_pickle=False)
        return sound
    import av

    pieces: list[NDArray[np.float32]] = []
    length = 0
    try:
        with av.open(str(path), options=_SAFE) as file:
            _check_codec(file.streams.audio[0].codec_context)
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
    """Frames evenly spread over the film, an even number of them, and how many per second. A
    `.npy` file holds these frames."""
    if path.suffix == ".npy":
        return _kept_film(path), FRAMES_PER_SECOND
    import av

    frames: list[tuple[float, Image]] = []
    try:
        with av.open(str(path), options=_SAFE) as file:
            stream = file.streams.video[0]
            _check_codec(stream.codec_context)
            if stream.width * stream.height > _LARGEST_FRAME:
                raise _too_large()
            due = 0.0
            for frame in file.decode(stream):
                time = len(frames) / FRAMES_PER_SECOND if frame.time is None else frame.time
                if time + 1e-6 >= due:
                    frames.append((time, _shrunk(frame.to_image())))
                    due = len(frames) / FRAMES_PER_SECOND
                if len(frames) > MAX_FRAMES:
                    break
    except RequestError:
        raise
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


def _kept_film(path: Path) -> list[Image]:
    from PIL.Image import fromarray

    film = np.load(path, mmap_mode="r", allow_pickle=False)
    return [fromarray(np.ascontiguousarray(frame)) for frame in film]


def _check_codec(codec: Any) -> None:
    if codec is None or codec.name not in _CODECS:
        raise ValueError("a codec that is not decoded")


def _shrunk(picture: Image) -> Image:
    from PIL.Image import Resampling

    share = (_FRAME_PIXELS / (picture.width * picture.height)) ** 0.5
    if share >= 1:
        return picture
    size = (max(round(picture.width * share), 1), max(round(picture.height * share), 1))
    return picture.resize(size, Resampling.BOX)


def _too_large() -> RequestError:
    return RequestError(
        f"The frames of the video have more than {_LARGEST_FRAME >> 20} million pixels.",
        hint="Send a smaller one.",
        code="video_too_large",
        param="messages",
    )


_COMMON = {"image": "PNG or JPEG", "audio": "WAV, MP3, FLAC or Ogg", "video": "MP4 or WebM"}


def _unreadable(kind: str) -> RequestError:
    return RequestError(
        f"A file of the request cannot be read as {kind}.",
        hint=f"Send a common format: {_COMMON[kind]}.",
        code=f"invalid_{kind}",
        param="messages",
    )
