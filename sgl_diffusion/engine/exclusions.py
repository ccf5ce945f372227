"""Options that cannot be followed, whatever the model is, and those that exclude each other.

Imports no torch: commands ask here before they start anything. What depends on the model or the
device is refused where it is known, with the same words.
"""

from __future__ import annotations

from sgl_diffusion.base.config import EngineOptions
from sgl_diffusion.base.errors import ConfigError
from sgl_diffusion.base.lora import LoraSetting, settings_to_begin_with
from sgl_diffusion.base.memory import check_budget
from sgl_diffusion.distributed.layout import Degrees, ranks_each
from sgl_diffusion.distributed.nodes import Nodes
from sgl_diffusion.engine.offload.plan import DIT, asked, flags
from sgl_diffusion.loader.files import other_weights

DIFFUSERS = "the model runs through diffusers"
ON_CPU = "the model runs on the CPU"
COME_AND_GO = "the weights of the transformer come and go"

# Options that the diffusers backend cannot honour, and what is there instead.
_NOT_HERE = {
    "vae_precision": "; --dit-precision is the precision of the whole pipeline",
    "text_encoder_precision": "; --dit-precision is the precision of the whole pipeline",
    "attention_backend": "",
    "transformer_path": "",
    "transformer_2_path": "",
    "vae_tile_size": "",
}

# What the attention backends themselves say of any model.
ONLY_CUDA = ("flash", "triton")
NARROW_ON_CUDA = ("flash", "native", "triton")
NO_LSE = ("flash", "sdpa")


def check_options(options: EngineOptions) -> None:
    """Raise for what is known to fail before a model is opened."""
    _check_model(options)
    check_budget(options.memory_budget)
    Degrees.of(options).layouts()
    Nodes.of(options)
    other_weights(options)
    if options.backend == "diffusers":
        _check_ranks(options)
        check_whole(options, f"{DIFFUSERS}, which keeps it whole")
    _check_quantization(options)
    check_adapters(options)
    _check_attention(options)
    refuse_compile(compile_obstacle(options) if options.enable_torch_compile else "")
    refuse_graphs(graphs_obstacle(options) if options.cuda_graphs == "on" else "")


def compile_obstacle(options: EngineOptions) -> str:
    """Why no blocks can be compiled; empty where options do not say."""
    if options.backend == "diffusers":
        return DIFFUSERS
    if ranks_each(options) > 1:
        return "several ranks exchange data within a block"
    return COME_AND_GO if options.dit_layerwise_offload else ""


def graphs_obstacle(options: EngineOptions) -> str:
    """Why no CUDA graphs can be made; empty where options do not say."""
    if options.backend == "diffusers":
        return DIFFUSERS
    if options.device == "cpu":
        return ON_CPU
    if ranks_each(options) > 1:
        return "several ranks exchange data within a step"
    if options.dit_layerwise_offload:
        return COME_AND_GO
    return "its blocks are compiled" if options.enable_torch_compile else ""


def refuse_compile(reason: str) -> None:
    """For whoever asked for compiled blocks, if there is a reason against them."""
    if reason:
        raise ConfigError(
            f"--enable-torch-compile cannot be followed: {reason}.",
            hint="Leave it out.",
            param="enable_torch_compile",
        )


def refuse_graphs(reason: str) -> None:
    if reason:
        raise ConfigError(
            f"--cuda-graphs on cannot be followed: {reason}.",
            hint="Use --cuda-graphs auto.",
            param="cuda_graphs",
        )


def check_whole(options: EngineOptions, why: str) -> None:
    """What the diffusers backend cannot do: an option that is given is followed or refused."""
    names = asked(options)
    if options.quantization != "none":
        names = (*names, "quantization")
    if names:
        raise ConfigError(
            f"{flags(names)}: {why}.", hint="Leave these options out.", param=names[0]
        )
    for option, hint in _NOT_HERE.items():
        if getattr(options, option) not in ("auto", None, 0):
            raise ConfigError(
                f"{option} cannot be chosen with the diffusers backend.",
                hint=f"Leave it out{hint}.",
                param=option,
            )


def check_adapters(options: EngineOptions) -> tuple[LoraSetting, ...]:
    """The adapters to begin with."""
    settings = settings_to_begin_with(
        options.lora_path,
        options.lora_nickname,
        options.lora_scale,
        alphas=options.lora_alpha,
        weight_names=options.lora_weight_name,
        revisions=options.lora_revision,
    )
    reason = ""
    if options.dit_layerwise_offload:
        reason = "are away until they are needed (--dit-layerwise-offload)"
    elif options.quantization != "none":
        reason = f"are {options.quantization}"
    if settings and options.lora_merge_mode == "merge" and reason:
        raise ConfigError(
            f"Adapters cannot be merged here: the weights of the transformer {reason}.",
            hint="Use --lora-merge-mode dynamic.",
            param="lora_merge_mode",
        )
    return settings


def _check_model(options: EngineOptions) -> None:
    for option in ("revision", "variant"):
        if options.model_path is None and getattr(options, option) is not None:
            raise ConfigError(
                f"{flags([option])} is about a repository; there is no --model-path.",
                hint="Name the model, too, or leave it out.",
                param=option,
            )


def _check_ranks(options: EngineOptions) -> None:
    if ranks_each(options) > 1:
        raise ConfigError(
            f"{options.num_gpus} ranks cannot run one model: {DIFFUSERS}, on one device only.",
            hint="Leave --num-gpus out, and start one server per device.",
            param="num_gpus",
        )


def _check_quantization(options: EngineOptions) -> None:
    if options.quantization != "none" and options.dit_layerwise_offload:
        raise ConfigError(
            f"--quantization {options.quantization} and {flags([DIT])} exclude each other: blocks "
            "that are read in each step would be quantised in each step.",
            hint="Use one of them.",
            param="quantization",
        )


def _check_attention(options: EngineOptions) -> None:
    name, reason = options.attention_backend, ""
    on_cuda = options.device == "cuda" or name in ONLY_CUDA
    if name in ONLY_CUDA and options.device == "cpu":
        reason = "it runs on cuda, not on cpu"
    elif name in NARROW_ON_CUDA and on_cuda and options.dit_precision == "fp32":
        reason = "on a GPU it computes in bf16 and fp16, not in fp32"
    elif name in NO_LSE and all(layout.ring > 1 for layout in Degrees.of(options).layouts()):
        reason = "it gives no log-sum-exp, by which a ring puts its parts together"
    if reason:
        raise ConfigError(
            f"--attention-backend {name} cannot be followed: {reason}.",
            hint="Use --attention-backend auto.",
            param="attention_backend",
        )
