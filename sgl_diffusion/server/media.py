"""Pictures and clips as files: uint8 arrays in, PNG, JPEG, WebP or MP4 out. Runs in threads."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.uint8]]

IMAGE_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
VIDEO_TYPE = "video/mp4"
IMAGE_QUALITY = 75
VIDEO_QUALITY = 50
_BT709 = 1
_LIMITED_RANGE = 1


def encode_image(picture: Array, kind: str, quality: int = IMAGE_QUALITY) -> bytes:
    """One picture [height, width, 3] as a file of `kind`; PNG is lossless and ignores `quality`."""
    from PIL import Image

    assert picture.ndim == 3 and picture.shape[2] == 3, picture.shape
    options: dict[str, Any] = {
        "png": {"compress_level": 4},
        "jpeg": {"quality": max(quality, 1), "subsampling": 0 if quality >= 90 else 2},
        "webp": {"quality": quality},
    }[kind]
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format=kind, **options)
    return buffer.getvalue()


def encode_video(clip: Array, path: Path, *, fps: int, quality: int = VIDEO_QUALITY) -> None:
    """Write frames [frame, height, width, 3] to `path` as H.264 in MP4, index first."""
    import av
    from av.video.reformatter import ColorRange, Colorspace

    frames, height, width, channels = clip.shape
    assert frames > 0 and channels == 3, clip.shape
    assert height % 2 == 0 and width % 2 == 0, "4:2:0 chroma needs even sizes"
    # Rate factor 40 is the worst x264 picture worth sending, 6 is beyond what an eye can tell.
    options = {"preset": "fast", "crf": f"{40 - 0.34 * quality:.1f}"}
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
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
