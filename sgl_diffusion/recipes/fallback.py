"""The generic fallback: any diffusers pipeline that makes images or videos, run as a whole.

Slower than a native recipe (no batching over requests, no kernels of ours), but with the same
routes, seeds, progress and cancelling.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.device import pick_device, pick_dtype
from sgl_diffusion.base.errors import ConfigError, RequestError, SetupError
from sgl_diffusion.base.params import ModelCard, ResolvedParams
from sgl_diffusion.engine import pictures
from sgl_diffusion.engine.exclusions import check_whole
from sgl_diffusion.engine.pipeline import Adaptable, OnPartial
from sgl_diffusion.engine.previews import preview_steps
from sgl_diffusion.engine.pulse import keep_pulse
from sgl_diffusion.loader.adapters.types import TRANSFORMER, TRANSFORMER_2
from sgl_diffusion.loader.index import ModelIndex
from sgl_diffusion.loader.rules import Rules
from sgl_diffusion.recipes import fallback_previews as previews
from sgl_diffusion.recipes.fallback_calls import Call, Calls, picture_arguments, reason_against
from sgl_diffusion.recipes.fallback_card import card_of
from sgl_diffusion.recipes.fit import check_fits

OnStep = Callable[[int, int], None]


def open_fallback(index: ModelIndex, options: EngineOptions, name: str) -> DiffusersPipeline:
    """Load the pipeline class that model_index.json names."""
    import diffusers

    check_whole(options, f"{index.pipeline} runs through diffusers, which keeps it whole")
    kind: Any = getattr(diffusers, index.pipeline, None)
    known = isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)
    if not known:
        raise ConfigError(
            f"diffusers {diffusers.__version__} has no pipeline {index.pipeline}.",
            hint="Install the diffusers version that the model's page names.",
        )
    accepted = inspect.signature(kind.__call__).parameters
    reason = reason_against(kind.__name__, accepted)
    if reason is not None:
        raise ConfigError(
            f"{index.pipeline} cannot be served: {reason}.",
            hint="Serve a model that makes images or videos from a prompt, or edits pictures.",
        )
    check_fits(index, options, whole=True)
    device = pick_device(options.device)
    dtype = pick_dtype(options.dit_precision, device)
    try:
        pipe = kind.from_pretrained(
            index.path,
            dtype=dtype,
            variant=options.variant,
            use_safetensors=True,
            # Said once more, because not every class knows which of its components may be absent.
            **dict.fromkeys(index.absent),
        )
    except (OSError, ValueError, ImportError) as error:
        raise SetupError(
            f"{index.path} cannot be loaded as {index.pipeline} ({type(error).__name__}).",
            hint="Check that it is complete and holds safetensors weights.",
            code="bad_checkpoint",
        ) from error
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    calls = Calls.of(pipe)
    return DiffusersPipeline(calls, card_of(calls, index, accepted, name, device, dtype))


class DiffusersPipeline:
    """Implements `engine.pipeline.WholePipeline`."""

    def __init__(self, calls: Calls, card: ModelCard) -> None:
        self._calls = calls
        self.card = card
        self._look_up: Callable[[], None] = _nothing
        # A step is one long call to this class, and so are encoding and decoding.
        parts = calls.plain.pipe.components.values()
        networks = [part for part in parts if isinstance(part, nn.Module)]
        modules = [module for network in networks for module in network.modules()]
        keep_pulse(modules, torch.device(card.device), lambda: self._look_up())

    def adaptables(self) -> dict[str, Adaptable]:
        """The networks and the text encoders, under the names that files have for them."""
        parts: dict[str, Any] = self._calls.plain.pipe.components
        if isinstance(parts.get("unet"), nn.Module):
            parts = {**parts, TRANSFORMER: parts["unet"]}
        return {
            name: Adaptable(part, Rules(), type(part).__name__)
            for name, part in parts.items()
            if isinstance(part, nn.Module)
            and (name in (TRANSFORMER, TRANSFORMER_2) or name.startswith("text_encoder"))
        }

    @torch.inference_mode()
    def run(
        self, params: ResolvedParams, on_step: OnStep, on_partial: OnPartial
    ) -> list[torch.Tensor]:
        call = self._calls.choose(params)
        arguments = self._arguments(call, params)
        if not params.images and call.takes_seeds:
            return self._one(call, arguments, params, _Watch(on_step, on_partial, params))
        if params.images:
            given = [pictures.open_picture(path) for path in params.images]
            arguments |= picture_arguments(call, params, given, self.card.edits)
        clips: list[torch.Tensor] = []
        # One after the other: not every pipeline repeats its pictures for several outputs.
        for row, seed in enumerate(params.seeds):
            one = dataclasses.replace(params, seeds=(seed,))
            arguments |= self._arguments(call, one)
            watch = _Watch(on_step, on_partial, params, row, len(params.seeds))
            clips += self._one(call, arguments, one, watch)
        if params.mask is None:
            return clips
        pixels = torch.from_numpy(np.array(arguments["image"], dtype=np.float32))
        share = torch.from_numpy(np.array(arguments["mask_image"], dtype=np.float32) / 255)
        return [pictures.keep_outside(clip, pixels, share) for clip in clips]

    def _one(
        self, call: Call, arguments: dict[str, Any], params: ResolvedParams, watch: _Watch
    ) -> list[torch.Tensor]:
        """One call of the pipeline."""
        strength = arguments.get("strength")
        if strength is not None and int(params.num_inference_steps * strength) == 0:
            watch.finish()  # diffusers refuses to run no step at all
            return [torch.from_numpy(np.array(arguments["image"]))[None]]
        hook = None
        watch.step(0)
        with contextlib.ExitStack() as stack:
            foreseen = None
            if params.partial_images:
                foreseen = stack.enter_context(previews.watched(call.pipe))
            if "callback_on_step_end" in call.accepted:

                def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
                    watch.step(step + 1)
                    latents = foreseen() if foreseen else None
                    if latents is not None and watch.due(step + 1):
                        watch.show(step + 1, previews.decode(pipe, latents, params))
                    return tensors

                arguments = {**arguments, "callback_on_step_end": after_step}
            else:  # no callback: every call of the network is a chance to stop
                network = getattr(call.pipe, "transformer", None)
                network = network or getattr(call.pipe, "unet", None)
                if network is not None:
                    hook = network.register_forward_pre_hook(lambda *_: watch.step(0))
            self._look_up = watch.again
            try:
                return self._clips(call.pipe(**arguments))
            finally:
                self._look_up = _nothing
                if hook is not None:
                    hook.remove()

    def _arguments(self, call: Call, params: ResolvedParams) -> dict[str, Any]:
        """The call's arguments: of what the class does not take, only defaults may be dropped."""
        generators = [torch.Generator().manual_seed(seed) for seed in params.seeds]
        arguments: dict[str, Any] = {
            "prompt": params.prompt,
            "num_inference_steps": params.num_inference_steps,
            "generator": generators if len(generators) > 1 else generators[0],
            "output_type": "np",
        }
        if not params.images or "width" in call.accepted:  # else the picture gives the size
            arguments |= {"width": params.width, "height": params.height}
        if "num_frames" in call.accepted:
            arguments["num_frames"] = params.num_frames
            arguments["num_videos_per_prompt"] = len(params.seeds)
            if "frame_rate" in call.accepted:
                arguments["frame_rate"] = params.fps
        else:
            arguments["num_images_per_prompt"] = len(params.seeds)
        optional = {
            "negative_prompt": params.negative_prompt or None,
            "guidance_scale": params.guidance_scale,
            "true_cfg_scale": params.true_cfg_scale,
            "guidance_scale_2": params.guidance_scale_2,
            "max_sequence_length": params.max_sequence_length,
            "flow_shift": params.flow_shift,
        }
        defaults = self.card.defaults
        for name, value in optional.items():
            if name in call.accepted and value is not None:
                arguments[name] = value
            elif value not in (None, getattr(defaults, name, None)):
                raise RequestError(
                    f"{type(call.pipe).__name__} takes no {name}.",
                    code="unsupported_parameter",
                    param=name,
                )
        unknown = sorted(set(arguments) - call.accepted)
        if unknown:
            raise ConfigError(
                f"{type(call.pipe).__name__} takes no {', '.join(unknown)}: it cannot be served."
            )
        return arguments

    def _clips(self, result: Any) -> list[torch.Tensor]:
        """Frames in [0, 1] as diffusers gives them, to one uint8 clip per output."""
        pictures = result.frames if hasattr(result, "frames") else result.images
        clips = np.asarray(pictures)
        if not hasattr(result, "frames"):
            clips = clips[:, None]
        if clips.dtype != np.uint8:
            clips = (clips * 255).round().clip(0, 255).astype(np.uint8)
        return [torch.from_numpy(clip) for clip in clips]


def _nothing() -> None:
    pass


class _Watch:
    """What one call of a pipeline has done: its progress within the job, its partial pictures."""

    def __init__(
        self,
        on_step: OnStep,
        on_partial: OnPartial,
        params: ResolvedParams,
        row: int = 0,
        of: int = 1,
    ) -> None:
        self._on_step, self._on_partial = on_step, on_partial
        self._row, self._due = row, preview_steps(params)
        self._steps = params.num_inference_steps - params.start_step
        self._before, self._total = row * self._steps, of * self._steps
        self._done = 0

    def step(self, done: int) -> None:
        self._done = min(done, self._steps)
        self.again()

    def again(self) -> None:
        self._on_step(self._before + self._done, self._total)

    def finish(self) -> None:
        self.step(self._steps)

    def due(self, step: int) -> bool:
        return step in self._due

    def show(self, step: int, frames: list[torch.Tensor]) -> None:
        for row, picture in enumerate(frames, self._row):
            self._on_partial(self._due.index(step), row, step, picture)
