"""sgl_diffusion: a fast engine that serves diffusion image and video models.

Importing the package imports no torch; `DiffGenerator` is fetched on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgl_diffusion.client.generator import DiffGenerator

__version__ = "0.1.0"
__all__ = ["DiffGenerator", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "DiffGenerator":
        from sgl_diffusion.client.generator import DiffGenerator

        return DiffGenerator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
