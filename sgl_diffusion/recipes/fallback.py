"""The generic fallback: any diffusers text-to-image or text-to-video pipeline, run as a whole.

Slower than a native recipe (no batching over requests, no kernels of ours), but with the same
routes, seeds, progress and cancelling.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.device import dtype_name, pick_device, pick_dtype
from sgl_diffusion.base.errors import ConfigError, RequestError, SetupError
from sgl_diffusion.base.params import ModelCard, ResolvedParams, SamplingDefaults
from sgl_diffusion.engine.pulse import keep_pulse
from sgl_diffusion.loader.index import ModelIndex

OnStep = Callable[[int, int], None]


def open_fallback(index: ModelIndex, options: EngineOptions, name: str) -> DiffusersPipeline:
    """Load the pipeline class that model_index.json names."""
    import diffusers

    for option in ("vae_precision", "text_encoder_precision", "attention_backend"):
        if getattr(options, option) != "auto":
            raise ConfigError(
                f"{option} cannot be chosen with the diffusers backend.",
                hint="Leave it out; --dit-precision is the precision of the whole pipeline.",
                param=option,
            )
    kind: Any = getattr(diffusers, index.pipeline, None)
    known = isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)
    if not known:
        raise ConfigError(
            f"diffusers {diffusers.__version__} has no pipeline {index.pipeline}.",
            hint="Install the diffusers version that the model's page names.",
        )
    accepted = inspect.signature(kind.__call__).parameters
    needed = [
        argument
        for argument, parameter in accepted.items()
        if parameter.default is inspect.Parameter.empty
        and argument not in ("self", "prompt", "kwargs", "args")
    ]
    if needed or "prompt" not in accepted:
        raise ConfigError(
            f"{index.pipeline} cannot be served: it does not start from a prompt alone"
            + (f" (it needs {', '.join(needed)})." if needed else "."),
            hint="Serve a text-to-image or text-to-video model.",
        )
    device = pick_device(options.device)
    dtype = pick_dtype(options.dit_precision, device)
    try:
        pipe = kind.from_pretrained(index.path, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, ImportError) as error:
        raise SetupError(
            f"{index.path} cannot be loaded as {index.pipeline} ({type(error).__name__}).",
            hint="Check that it is complete and holds safetensors weights.",
            code="bad_checkpoint",
        ) from error
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return DiffusersPipeline(pipe, set(accepted), _card(pipe, index, accepted, name, device, dtype))


class DiffusersPipeline:
    """Implements `engine.pipeline.WholePipeline`."""

    def __init__(self, pipe: Any, accepted: set[str], card: ModelCard) -> None:
        self._pipe = pipe
        self._accepted = accepted
        self.card = card
        self._look_up: Callable[[], None] = _nothing
        # A step is one long call to this class, and so are encoding and decoding.
        networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        modules = [module for network in networks for module in network.modules()]
        keep_pulse(modules, torch.device(card.device), lambda: self._look_up())

    @torch.inference_mode()
    def run(self, params: ResolvedParams, on_step: OnStep) -> list[torch.Tensor]:
        arguments = self._arguments(params)
        total = params.num_inference_steps
        done = 0
        on_step(done, total)
        hook = None
        if "callback_on_step_end" in self._accepted:

            def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
                nonlocal done
                done = min(step + 1, total)
                on_step(done, total)
                return tensors

            arguments["callback_on_step_end"] = after_step
        else:  # no callback: every call of the network is a chance to stop
            network = getattr(self._pipe, "transformer", None) or getattr(self._pipe, "unet", None)
            if network is not None:
                hook = network.register_forward_pre_hook(lambda *_: on_step(0, total))
        self._look_up = lambda: on_step(done, total)
        try:
            return self._clips(self._pipe(**arguments))
        finally:
            self._look_up = _nothing
            if hook is not None:
                hook.remove()

    def _arguments(self, params: ResolvedParams) -> dict[str, Any]:
        """The call's arguments: of what the class does not take, only defaults may be dropped."""
        arguments: dict[str, Any] = {
            "prompt": params.prompt,
            "width": params.width,
            "height": params.height,
            "num_inference_steps": params.num_inference_steps,
            "generator": [torch.Generator().manual_seed(seed) for seed in params.seeds],
            "output_type": "np",
        }
        if "num_frames" in self._accepted:
            arguments["num_frames"] = params.num_frames
            arguments["num_videos_per_prompt"] = len(params.seeds)
        else:
            arguments["num_images_per_prompt"] = len(params.seeds)
        optional = {
            "negative_prompt": params.negative_prompt or None,
            "guidance_scale": params.guidance_scale,
            "max_sequence_length": params.max_sequence_length,
            "flow_shift": params.flow_shift,
        }
        defaults = self.card.defaults
        for name, value in optional.items():
            if name in self._accepted and value is not None:
                arguments[name] = value
            elif value not in (None, getattr(defaults, name, None)):
                raise RequestError(
                    f"{self.card.pipeline_class} takes no {name}.",
                    code="unsupported_parameter",
                    param=name,
                )
        unknown = sorted(set(arguments) - self._accepted)
        if unknown:
            raise ConfigError(
                f"{self.card.pipeline_class} takes no {', '.join(unknown)}: it cannot be served."
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


def _card(
    pipe: Any,
    index: ModelIndex,
    accepted: Any,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
) -> ModelCard:
    video = "num_frames" in accepted

    def default(argument: str, other: Any) -> Any:
        value = accepted[argument].default if argument in accepted else None
        return other if value is None else value

    factor = int(getattr(pipe, "vae_scale_factor", None) or 8)
    edge = int(getattr(pipe, "default_sample_size", None) or 1024 // factor) * factor
    precision = dtype_name(dtype)
    return ModelCard(
        name=name,
        path=name,
        family="diffusers",
        pipeline_class=index.pipeline,
        backend="diffusers",
        tasks=("T2I", "T2V") if video else ("T2I",),
        defaults=SamplingDefaults(
            width=default("width", edge),
            height=default("height", edge),
            num_frames=default("num_frames", 1) if video else 1,
            num_inference_steps=default("num_inference_steps", 50),
            guidance_scale=default("guidance_scale", 1.0),
            max_sequence_length=default("max_sequence_length", 512),
        ),
        device=device.type,
        dit_precision=precision,
        vae_precision=precision,
        text_encoder_precision=precision,
        size_multiple=max(16, factor),
        frame_multiple=int(getattr(pipe, "vae_scale_factor_temporal", None) or 4) if video else 1,
    )
