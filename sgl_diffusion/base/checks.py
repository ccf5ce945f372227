"""The checks of single sampling parameters; each raises a RequestError that names the argument."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.footprint import check_memory
from sgl_diffusion.base.lora import check_uses

if TYPE_CHECKING:
    from sgl_diffusion.base.params import ModelCard, ResolvedParams, SamplingParams

MAX_PROMPT_CHARS = 32_000
MAX_PARTIAL_IMAGES = 3
MAX_OUTPUTS = 10
MAX_SEED = 2**63 - 1
DEFAULT_SEED = 42
_TEACACHE = 0.1
_TEACACHE_LIMITS = (0.001, 1.0)
_NEUTRAL = {"true_cfg_scale": 1.0}


def check_texts(wish: SamplingParams) -> None:
    if not wish.prompt.strip():
        raise RequestError("The prompt is empty.", code="prompt_empty", param="prompt")
    for param, text in (("prompt", wish.prompt), ("negative_prompt", wish.negative_prompt)):
        if text is not None and len(text) > MAX_PROMPT_CHARS:
            raise RequestError(
                f"{param} has {len(text)} characters; the limit is {MAX_PROMPT_CHARS}.",
                code="prompt_too_long",
                param=param,
            )
        if text is not None and any("\ud800" <= char <= "\udfff" for char in text):
            raise RequestError(
                f"{param} is not valid Unicode.",
                hint="On a command line it has to be UTF-8.",
                code="invalid_unicode",
                param=param,
            )


def check_pictures(card: ModelCard, wish: SamplingParams, *, video: bool) -> None:
    """The input pictures, and what makes sense only with them."""
    count = len(wish.images)
    if video and count and card.edits != "native":
        raise RequestError(
            f"input_reference is not supported: {card.name} makes no videos from pictures.",
            hint="Leave the picture out.",
            code="unsupported_parameter",
            param="images",
        )
    if count > card.max_images:
        takes = f"at most {card.max_images}" if card.max_images else "no pictures"
        raise RequestError(
            f"{card.name} takes {takes}.",
            hint="Send fewer." if card.max_images else "It works from a prompt alone.",
            code="too_many_images" if card.max_images else "edits_not_supported",
            param="images",
        )
    if count < card.min_images:
        raise RequestError(
            f"{card.name} works on a picture, and none was given.",
            hint="Use /v1/images/edits, or --image on the command line.",
            code="image_required",
            param="images",
        )
    if wish.mask is not None and not card.masks:
        raise _takes_no(card, "mask")
    if wish.mask is None and card.needs_mask:
        raise RequestError(
            f"{card.name} makes a part of a picture anew, and no mask was given.",
            hint="Use /v1/images/edits with a mask, or --mask on the command line.",
            code="mask_required",
            param="mask",
        )
    if wish.strength is not None and card.edits != "image-to-image":
        raise _takes_no(card, "strength")
    for param in ("mask", "strength"):
        if getattr(wish, param) is not None and not count:
            raise RequestError(
                f"{param} needs a picture to work on.",
                code="conflicting_parameters",
                param=param,
            )
    if wish.mask is not None and video:
        raise _takes_no(card, "mask", " for videos")
    if wish.partial_images and not card.previews:
        raise RequestError(
            f"{card.name} cannot show pictures that are under way.",
            hint="Leave partial_images out.",
            code="streaming_not_supported",
            param="partial_images",
        )


def check_loras(card: ModelCard, wish: SamplingParams) -> None:
    check_uses(wish.loras)
    if wish.loras and not card.lora_targets:
        raise RequestError(
            f"{card.name} takes no adapters: it is served through the {card.backend} backend.",
            code="lora_not_supported",
            param="lora",
        )


def teacache_threshold(card: ModelCard, wish: SamplingParams) -> float | None:
    """How much the beginnings of steps may differ that share the rest; None for not at all."""
    threshold = wish.teacache_threshold
    if not wish.enable_teacache:
        if threshold is not None:
            raise RequestError(
                "teacache_threshold needs enable_teacache.",
                code="conflicting_parameters",
                param="teacache_threshold",
            )
        return None
    if not card.step_cache:
        raise _takes_no(card, "enable_teacache", " as it is served")
    return within(
        "teacache_threshold", _TEACACHE if threshold is None else threshold, *_TEACACHE_LIMITS
    )


def check_interval(card: ModelCard, wish: SamplingParams) -> None:
    """The steps that guidance is on in, and those that compute it."""
    start, stop = wish.guidance_start, wish.guidance_stop
    for param, usual in (("guidance_start", 0.0), ("guidance_stop", 1.0), ("cfg_gate_step", 1.0)):
        value: float = getattr(wish, param)
        if within(param, value, 0.0, 1.0) != usual and card.backend != "native":
            raise _takes_no(card, param, " as it is served")
    if start >= stop:
        raise RequestError(
            f"Guidance from {start:g} to {stop:g} of the steps is none.",
            hint="Turn it off with guidance_scale, or let guidance_stop be larger.",
            code="conflicting_parameters",
            param="guidance_stop",
        )


def seeds(wish: SamplingParams) -> tuple[int, ...]:
    """One for each output."""
    count = int(within("n", wish.num_outputs, 1, MAX_OUTPUTS))
    seed = DEFAULT_SEED if wish.seed is None else wish.seed
    if isinstance(seed, int):
        within("seed", seed, 0, MAX_SEED)
        return tuple((seed + i) % (MAX_SEED + 1) for i in range(count))
    if len(seed) != count:
        raise RequestError(
            f"seed lists {len(seed)} values for {count} outputs.",
            hint="Give one seed per output, or a single number.",
            code="mismatched_lengths",
            param="seed",
        )
    return tuple(int(within("seed", value, 0, MAX_SEED)) for value in seed)


def strength(card: ModelCard, wish: SamplingParams) -> float | None:
    """Of the steps of an image-to-image job; None where denoising begins with noise."""
    if not wish.images or card.edits != "image-to-image":
        return None
    # What a mask marks is made anew, unless something else is asked for.
    default = card.defaults.strength if wish.mask is None else 1.0
    return within("strength", default if wish.strength is None else wish.strength, 0.0, 1.0)


def check_extent(card: ModelCard, params: ResolvedParams) -> None:
    """All outputs and frames together: their pixels, and the memory they take."""
    count = len(params.seeds)
    pixels = params.width * params.height * params.num_frames * count
    if pixels > card.max_pixels:
        raise RequestError(
            f"{count} x {params.num_frames} frames of {params.width}x{params.height} are "
            f"{pixels / 1e6:.0f} million pixels; the limit is {card.max_pixels / 1e6:.0f}.",
            hint="Ask for a smaller size, fewer frames or fewer outputs.",
            code="request_too_large",
        )
    check_memory(card, params)


def optional(
    card: ModelCard, param: str, wish: float | None, low: float, high: float
) -> float | None:
    """A parameter that only some models know: those with a default for it. At its neutral value
    the others take it, too."""
    default: float | None = getattr(card.defaults, param)
    if default is None:
        if wish not in (None, _NEUTRAL.get(param)):
            raise _takes_no(card, param)
        return None
    return default if wish is None else within(param, wish, low, high)


def _takes_no(card: ModelCard, param: str, where: str = "") -> RequestError:
    return RequestError(
        f"{card.name} takes no {param}{where}.",
        hint="Leave it out.",
        code="unsupported_parameter",
        param=param,
    )


def within(param: str, value: float, low: float, high: float) -> float:
    if isinstance(value, float) and not math.isfinite(value):
        raise RequestError(f"{param} is not a finite number.", code="not_finite", param=param)
    if low <= value <= high:
        return value
    raise RequestError(
        f"{param} is {_plain(value)}; it must be from {_plain(low)} to {_plain(high)}.",
        code="out_of_range",
        param=param,
    )


def _plain(value: float) -> str:
    if abs(value) > 1e20:
        return "far off"
    return str(value) if isinstance(value, int) else f"{value:g}"
