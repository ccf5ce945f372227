"""The small model inside the package, which is served where no other is named.

It draws one coloured shape on a plain background, still or moving; `examples/train_demo` trains it.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "demo"
NAME = "shapes"
NOTE = (
    "the small model inside the package: it draws a circle, square, triangle, star, cross or ring "
    "in one colour on another, still or moving"
)
