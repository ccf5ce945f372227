"""Options of an app that chats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sgl_diffusion.base.config import PRECISIONS, AccessOptions, LimitOptions
from sgl_diffusion.base.options import option

# What a checkpoint says that it is, and what the served model is called.
OMNI_NAMES = {"qwen3_omni_moe": "qwen3-omni", "qwen2_5_omni": "qwen2.5-omni"}
# Published ones, for whoever misspells a name.
OMNI_MODELS = (
    "Qwen/Qwen3-Omni-30B-A3B-Instruct",
    "Qwen/Qwen2.5-Omni-7B",
    "Qwen/Qwen2.5-Omni-3B",
)


def written_precision(config: Mapping[str, Any]) -> str:
    """The name of the precision that the config.json of a checkpoint says; empty if it says
    none."""
    places = (config, config.get("thinker_config", {}))
    told = [place.get(key) for place in places for key in ("dtype", "torch_dtype")]
    names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    return next((names[name] for name in told if name in names), "")


@dataclass(frozen=True, kw_only=True)
class OmniOptions:
    """What the worker of an omni model needs to load and run it."""

    model_path: str = option("", "Folder of an omni model as transformers writes it, or hub id.")
    revision: str | None = option(None, "Branch, tag or commit of a hub repository.")
    model_name: str | None = option(
        None, "Name of the served model; default: qwen3-omni or qwen2.5-omni."
    )
    speech: bool = option(True, "Load what speaks; without it the answers are text.")
    process: tuple[str, ...] = option(
        (),
        "Stages that get a process of their own together, as in talker,code2wav, or with a device "
        "as in talker,code2wav@cuda:1; the others share one. There are preprocess, encoders, "
        "thinker, talker and code2wav. Repeatable.",
    )
    speech_look_ahead: int | None = option(
        None,
        "Qwen2.5 only: of the 36 passes of its decoder of speech, how many wait for the quarter of "
        "a second that follows. Few bring sound sooner, without it sound is exact.",
        least=0,
    )
    device: str = option("auto", "Where the model runs.", choices=("auto", "cpu", "cuda"))
    precision: str = option("auto", "Precision of the model.", choices=PRECISIONS)
    cuda_graphs: bool = option(
        False,
        "Record the steps of thinker and talker as CUDA graphs. Not yet run on a GPU.",
    )
    max_batch_rows: int = option(16, "Most answers written at the same time.", least=1)
    max_sequence_length: int = option(
        8192, "Most tokens of one request, prompt and answer.", least=16
    )
    max_prefix_memory: float = option(
        1.0, "GiB for the beginnings of earlier prompts, which need not be read again.", least=0
    )
    max_media_memory: float = option(
        0.5, "GiB for pictures, films and sound that may come again.", least=0
    )


@dataclass(frozen=True, kw_only=True)
class OmniServeOptions(OmniOptions, AccessOptions, LimitOptions):
    """`sgl-omni serve`."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on.")
    log_level: str = option("info", "debug, info, warning or error.")
    data_dir: str | None = option(
        None, "Folder for the media of requests while they are answered; default: a temporary one."
    )
    max_queue: int = option(
        128, "Most unfinished requests at a time; more are refused with 503.", least=1
    )
    max_audio_mb: int = option(100, "Largest sound in a request in MB.", least=1)
    max_input_chars: int = option(4096, "Longest text of a speech in characters.", least=1)
    request_timeout: float = option(550.0, "Seconds after which a request fails.", least=1)
    worker_timeout: float = option(
        120.0, "Seconds of silence after which a worker is replaced; at least three steps.", least=1
    )
    drain_timeout: float = option(25.0, "Seconds running requests get at shutdown.", least=0)
    allow_codec_fallback: bool = option(
        False,
        "Answer with WAV where a format cannot be made; the header x-audio-format tells.",
    )
