"""Where denoising begins: noise, or a picture with noise on it; and what of the picture is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

from sgl_diffusion.base.params import ResolvedParams
from sgl_diffusion.components.samplers import Solver, SolverState
from sgl_diffusion.engine import pictures

if TYPE_CHECKING:
    from PIL.Image import Image

    from sgl_diffusion.engine.pipeline import Pipeline


@dataclass(frozen=True)
class Origin:
    """The picture a job begins with, as clean latents [1,C,T,h,w].

    With a mask: `keep`, which broadcasts to them, is 1 where latents stay those of the picture;
    `pixels` [H,W,3] in 0..255 and `share` [H,W] say what becomes of the finished frame.
    """

    latents: Tensor
    keep: Tensor | None = None
    pixels: Tensor | None = None
    share: Tensor | None = None

    @classmethod
    def of(cls, pipeline: Pipeline, params: ResolvedParams, picture: Image) -> Origin:
        width, height = params.width, params.height
        pixels = pictures.to_pixels(picture, width, height)
        latents = pipeline.encode_images(pixels.to(pipeline.device)).float()
        if params.mask is None:
            return cls(latents)
        mask = pictures.open_mask(params.mask, picture.size)
        share = pictures.to_share(mask, width, height)
        # A cell of the latents is made anew as soon as one of its pixels is.
        cells = functional.adaptive_max_pool2d(share[None, None], latents.shape[-2:])
        keep = (cells == 0).float()[:, :, None].to(latents.device)
        frame = (pixels[0, :, 0].permute(1, 2, 0) + 1) * 127.5
        return cls(latents, keep, frame, share)

    def noised(self, noise: Tensor, sigma: float) -> Tensor:
        return sigma * noise + (1 - sigma) * self.latents

    def kept(self, latents: Tensor, noise: Tensor, sigma: float) -> Tensor:
        """`latents` at the noise level `sigma`, with the picture outside the mask."""
        if self.keep is None:
            return latents
        return self.keep * self.noised(noise, sigma) + (1 - self.keep) * latents

    def finish(self, frames: Tensor) -> Tensor:
        """Decoded uint8 frames [f,H,W,3] with the picture's own pixels outside the mask: a decoder
        looks at its surroundings, so kept latents alone do not keep the pixels at the border."""
        if self.share is None or self.pixels is None:
            return frames
        return pictures.keep_outside(frames, self.pixels, self.share)


def first_state(origin: Origin | None, noise: Tensor, solver: Solver) -> SolverState:
    """The state of a row before its first step."""
    noise = noise.float()
    if origin is None:
        return SolverState.start(noise)
    # All of the schedule: as from a prompt alone, to the bit.
    if solver.start > 0:
        noise = origin.noised(noise, solver.sigma(solver.start))
    return SolverState.start(noise)


def keep_origin(origin: Origin, state: SolverState, noise: Tensor, sigma: float) -> SolverState:
    """The state after a step, with the picture outside the mask, in the prediction of the clean
    latents, too."""
    if origin.keep is None:
        return state
    clean = origin.kept(state.m0, noise, 0.0)
    return state._replace(x=origin.kept(state.x, noise, sigma), m0=clean)
