"""Scenes the small model learns from: one coloured shape on a plain background, still or moving.

A scene is a few words (`Scene`), a sentence about it (`sentence`) and its pictures. Without a word
of them a shape is of medium size and in the centre; a colour that is left out was chosen by chance,
so the model learns to choose, too.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (240, 135, 35),
    "yellow": (245, 212, 50),
    "green": (40, 160, 70),
    "blue": (45, 90, 220),
    "purple": (130, 60, 180),
    "pink": (245, 150, 190),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus"),
    "ring": ("ring", "donut"),
}
SIZES = {"small": 0.13, "medium": 0.18, "large": 0.24}  # radius, of the shorter side
_SIZE_WORDS = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium",),
    "large": ("large", "large", "big", "huge"),
}
# Where the middle is, of a quarter of width and height.
PLACES = {
    "center": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}
_CENTER_WORDS = ("in the center", "in the middle", "at the center")
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_MOVE_WORDS = ("moving", "moving", "going", "sliding", "drifting", "flying")
SPEED = 1 / 32  # of the shorter side, a frame
REACH = 0.25

_STAR = tuple(
    (r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5))
    for k in range(10)
    for r in (1.08 if k % 2 == 0 else 0.46,)
)
_ARM = 0.36
_CROSS = (
    *((-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)),
    *((_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)),
)
_POLYGONS = {
    "square": ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
    "triangle": ((0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)),
    "star": _STAR,
    "cross": _CROSS,
}


@dataclass(frozen=True)
class Scene:
    shape: str
    colour: str
    background: str
    size: str = "medium"
    place: str = "center"
    motion: str | None = None
    outline: bool = False
    night: bool = False


def draw_scene(chance: random.Random, *, moving: bool, kept: bool = False) -> Scene:
    """A scene by chance, never of those kept for the eye; with `kept`, one of those only."""
    while True:
        scene = _any_scene(chance, moving)
        if is_kept(scene) == kept:
            return scene


def is_kept(scene: Scene) -> bool:
    """Whether training never shows it: a tenth of all scenes, for the eye to judge by."""
    what = (scene.shape, scene.colour, scene.background, scene.size, scene.place, scene.motion)
    return zlib.crc32(" ".join(map(str, what)).encode()) % 10 == 0


def _any_scene(chance: random.Random, moving: bool) -> Scene:
    """The shape and its background never have one colour."""
    colour, background = chance.sample(list(COLOURS), 2)
    scene = Scene(chance.choice(list(SHAPES)), colour, background, chance.choice(list(SIZES)))
    if moving and chance.random() < 0.9:
        return replace(scene, motion=chance.choice(list(MOTIONS)))
    place = "center" if chance.random() < 0.3 else chance.choice(list(PLACES))
    return replace(scene, place=place)


def sentence(scene: Scene, chance: random.Random | None = None) -> str:
    """What somebody would type for the scene: all of it, or with `chance` in many wordings, some
    with gaps and with words that say nothing."""
    if chance is None:
        return _plain(scene)
    words = [chance.choice(("a", "a", "a", "the", "one", ""))]
    if scene.size != "medium" or chance.random() < 0.4:
        words.append(chance.choice(_SIZE_WORDS[scene.size]))
    if chance.random() < 0.95:
        words.append(scene.colour)
    words.append(chance.choice(SHAPES[scene.shape]))
    if scene.motion is not None:
        to = chance.choice(("", "", "to the " if scene.motion in ("left", "right") else ""))
        words.append(f"{chance.choice(_MOVE_WORDS)} {to}{scene.motion}")
    elif scene.place != "center" or chance.random() < 0.6:
        words.append(_placed(scene.place, chance))
    behind = f"{chance.choice(('a', 'a', 'the', ''))} {scene.background} background"
    what, end = " ".join(words), chance.random()
    if end < 0.70:
        what = f"{what} {chance.choice(('on', 'on', 'over', 'in front of'))} {behind}"
    elif end < 0.80:
        what = f"{what}, {behind}"
    elif end < 0.88:
        what = f"{behind} with {what}"
    elif end < 0.94:
        what = f"{what} on {scene.background}"
    if chance.random() < 0.2:
        kind = "video" if scene.motion else chance.choice(("picture", "photo", "drawing"))
        what = f"{chance.choice(('a', 'the', ''))} {kind} of {what}"
    if chance.random() < 0.2:
        what = _sprinkled(what, chance)
    return " ".join(what.split())


def _plain(scene: Scene) -> str:
    where = f"moving {scene.motion}" if scene.motion else _placed(scene.place, None)
    size = "" if scene.size == "medium" else f"{scene.size} "
    return f"a {size}{scene.colour} {scene.shape} {where} on a {scene.background} background"


def _placed(place: str, chance: random.Random | None) -> str:
    if place == "center":
        return chance.choice(_CENTER_WORDS) if chance else _CENTER_WORDS[0]
    start = chance.choice(("on the", "at the", "in the")) if chance else "at the"
    if " " in place and chance and chance.random() < 0.5:
        return f"{start} {place} corner"
    return f"{start} {place}"


_FILLING = """
beautiful nice simple bright very really please quality detailed high best masterpiece flat style
minimal abstract modern clean sharp smooth cute funny happy photo render 4k cat dog house tree car
sky sun moon sea night day man woman with and that which some thing
""".split()


def _sprinkled(text: str, chance: random.Random) -> str:
    words = text.split()
    for _ in range(chance.randint(1, 3)):
        letters = "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(3, 8)))
        word = letters if chance.random() < 0.4 else chance.choice(_FILLING)
        # At an end: in the middle it might part "top" from "left".
        words.insert(0 if chance.random() < 0.5 else len(words), word)
    return " ".join(words)


VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys(
        word
        for group in (
            *(COLOURS, SIZES, MOTIONS, _MOVE_WORDS, _FILLING),
            *SHAPES.values(),
            *_SIZE_WORDS.values(),
            *(place.split() for place in PLACES),
            "a an the one on over in at of to with front middle center corner background".split(),
            "video picture photo drawing image clip".split(),
        )
        for word in group
    )
)


def pictures(scene: Scene, width: int, height: int, frames: int = 1) -> Tensor:
    """[frames, 3, height, width] in 0..1, edges smoothed over a pixel."""
    side = min(width, height)
    ys = (torch.arange(height) + 0.5 - height / 2) / side
    xs = (torch.arange(width) + 0.5 - width / 2) / side
    fore, back = (torch.tensor(COLOURS[name]) / 255 for name in (scene.colour, scene.background))
    if scene.night:
        fore, back = _by_night(fore, 0.75), _by_night(back, 0.3)
    drawn = []
    for x, y in middles(scene, width, height, frames):
        far = distance(scene.shape, xs[None, :] - x, ys[:, None] - y, SIZES[scene.size])
        if scene.outline:
            far = (far + 0.02).abs() - 0.02
        cover = (0.5 - far * side).clamp(0, 1)
        drawn.append(back[:, None, None] + cover * (fore - back)[:, None, None])
    return torch.stack(drawn)


def _by_night(colour: Tensor, light: float) -> Tensor:
    """Darker, and half way to the blue of moonlight."""
    moon = torch.tensor([0.35, 0.5, 1.0]) * colour.mean()
    return ((colour + moon) / 2 * light).clamp(0, 1)


def middles(scene: Scene, width: int, height: int, frames: int) -> list[tuple[float, float]]:
    """Where the shape is in each frame; a moving one passes the centre half way."""
    side = min(width, height)
    if scene.motion is None:
        across, along = PLACES[scene.place]
        return [(across * REACH * width / side, along * REACH * height / side)] * frames
    across, along = MOTIONS[scene.motion]
    steps = [SPEED * (frame - (frames - 1) / 2) for frame in range(frames)]
    return [(across * step, along * step) for step in steps]


def distance(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Distance of every pixel to the contour, negative inside."""
    x, y = torch.broadcast_tensors(x, y)
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "ring":
        return (torch.hypot(x, y) - 0.74 * radius).abs() - 0.26 * radius
    return _to_polygon([(px * radius, py * radius) for px, py in _POLYGONS[shape]], x, y)


def _to_polygon(corners: Sequence[tuple[float, float]], x: Tensor, y: Tensor) -> Tensor:
    nearest = torch.full_like(x, math.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        ex, ey = bx - ax, by - ay
        along = (((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        nearest = torch.minimum(nearest, torch.hypot(x - ax - along * ex, y - ay - along * ey))
        if ay != by:
            crosses = ((ay > y) != (by > y)) & (x < ex * (y - ay) / ey + ax)
            inside ^= crosses
    return torch.where(inside, -nearest, nearest)
