"""Pictures and clips as files: uint8 arrays in, PNG, JPEG, WebP or MP4 out. Runs in threads.

Quality is 0 to 100 everywhere. JPEG and WebP take it as it is; for H.264 it becomes the rate factor
40 - 0.34 x quality: 40 is the worst picture worth sending, 6 is beyond what an eye can tell. Every
point more makes a file that is larger and closer to the frames. PNG is lossless.
"""

from __future__ import annotations

import io
import json
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    Array = np.ndarray[Any, np.dtype[np.uint8]]

IMAGE_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
# What a video job leaves: ending and media type of each variant.
VIDEO_VARIANTS = {
    "video": (".mp4", "video/mp4"),
    "thumbnail": (".webp", "image/webp"),
    "spritesheet": (".jpg", "image/jpeg"),
}
IMAGE_QUALITY = 75
VIDEO_QUALITY = 50
SETTINGS_KEY = "sgl_diffusion"
PRESETS = (
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow",
)  # fmt: skip
_EXIF_IFD = 0x8769
_USER_COMMENT = 0x9286
_ASCII = b"ASCII\0\0\0"  # what the comment begins with: its character set
_MAX_COMMENT = 65_000  # a segment of a JPEG has 16 bits for its length
_BT709 = 1
_LIMITED_RANGE = 1


def encode_image(
    picture: Array, kind: str, quality: int = IMAGE_QUALITY, settings: str | None = None
) -> bytes:
    """One picture [height, width, 3] as a file of `kind`; PNG ignores `quality`. A PNG carries
    `settings` as text under `SETTINGS_KEY`, JPEG and WebP as the user comment of their EXIF."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    assert picture.ndim == 3 and picture.shape[2] == 3, picture.shape
    text = PngInfo()
    if settings is not None:
        text.add_itxt(SETTINGS_KEY, settings)
    exif = _user_comment(settings)
    options: dict[str, dict[str, Any]] = {
        "png": {"compress_level": 4, "pnginfo": text},
        "jpeg": {"quality": max(quality, 1), "subsampling": 0 if quality >= 90 else 2, **exif},
        "webp": {"quality": quality, **exif},
    }
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format=kind, **options[kind])
    return buffer.getvalue()


def _user_comment(settings: str | None) -> dict[str, Any]:
    """The argument that puts `settings` into a file's EXIF, unless it is too long for one."""
    from PIL import Image

    if settings is None:
        return {}
    # The comment is ASCII; JSON has another way to write the rest.
    text = "".join(c if c.isascii() else json.dumps(c)[1:-1] for c in settings).encode("ascii")
    if len(text) > _MAX_COMMENT:
        return {}
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _ASCII + text
    return {"exif": exif}


def exif_comment(exif: Image.Exif) -> str:
    """The settings in the EXIF of a JPEG or WebP; "" where there are none."""
    comment = exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
    return comment.removeprefix(_ASCII).decode("ascii") if isinstance(comment, bytes) else ""


def rate_factor(quality: int) -> float:
    """x264's constant rate factor for a quality from 0 to 100; falls as the quality rises."""
    return round(40 - 0.34 * quality, 2)


def x264_kernels(cpuinfo: str) -> str:
    """What x264 is told of a CPU that Linux describes so; "" lets it look for itself.

    Its AVX-512 kernels read memory that nobody wrote when a row of macroblocks is no whole vector,
    and the bits of equal frames change from run to run. The next best are as fast, and exact.
    """
    flags = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "").split()
    return "asm=avx2,fma3,bmi2" if "avx512f" in flags else ""


@cache
def _x264_options() -> dict[str, str]:
    try:
        kernels = x264_kernels(Path("/proc/cpuinfo").read_text())
    except OSError:
        kernels = ""
    return {"x264-params": kernels} if kernels else {}


def encode_video(
    clip: Array,
    path: Path,
    *,
    fps: int,
    quality: int = VIDEO_QUALITY,
    preset: str = "fast",
    settings: str | None = None,
) -> None:
    """Write frames [frame, height, width, 3] to `path` as H.264 in MP4, index first.

    `preset` trades time for bytes; `settings` becomes the comment of the file. Equal arguments give
    equal files.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    frames, height, width, channels = clip.shape
    assert frames > 0 and channels == 3, clip.shape
    assert height % 2 == 0 and width % 2 == 0, "4:2:0 chroma needs even sizes"
    assert preset in PRESETS, preset
    options = {"preset": preset, "crf": str(rate_factor(quality)), **_x264_options()}
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        if settings is not None:
            container.metadata["comment"] = settings
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        codec = stream.codec_context
        # Players guess the matrix from the size of the picture unless the file says it.
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED_RANGE
        for picture in clip:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
