"""The omni model: its files, and whether they fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.base.omni import OMNI_NAMES, OmniServeOptions, written_precision
from sgl_diffusion.cli.checks.probe import Probed
from sgl_diffusion.cli.checks.types import Check, failed, ok, refused, warning
from sgl_diffusion.loader.files import weight_files
from sgl_diffusion.loader.hub import local_model
from sgl_diffusion.loader.index import read_config
from sgl_diffusion.loader.sizes import counts_of

_READ = ("tokenizer_config.json", "preprocessor_config.json")
_VOICES = "spk_dict.pt"  # of Qwen2.5 alone
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_HEARS_AND_WRITES = "thinker."  # what has other names is for speech
_ALWAYS_FP32 = "token2wav."
_AGAIN = "Download the model again; the start says which file it misses."


def checks(probed: Probed, options: OmniServeOptions) -> Iterator[Check]:
    if not options.model_path:
        yield failed("model", "none is named", "Name one with --model-path.")
        return
    try:
        folder = local_model(options.model_path)
        if folder is None:
            yield ok("model", f"{options.model_path} is a name on the hub")
            return
        yield model(folder, options)
        yield weights(probed, options, folder)
    except SetupError as error:
        yield refused("model", error)


def model(folder: Path, options: OmniServeOptions) -> Check:
    """Whether it is of a family that is served, and whole. Raises SetupError."""
    kind = str(read_config(folder).get("model_type"))
    if kind not in OMNI_NAMES:
        served = ", ".join(OMNI_NAMES.values())
        return failed("model", f"{folder} is of the type {kind!r}", f"Served are {served}.")
    missing = [name for name in _READ if not (folder / name).is_file()]
    if missing:
        return failed("model", f"{folder} has no {', '.join(missing)}", _AGAIN)
    if OMNI_NAMES[kind] == "qwen2.5-omni" and options.speech and not (folder / _VOICES).is_file():
        return failed("model", f"{folder} has no voices, {_VOICES}", f"{_AGAIN} Or --no-speech.")
    return ok("model", f"{options.model_name or OMNI_NAMES[kind]} in {folder}")


def weights(probed: Probed, options: OmniServeOptions, folder: Path) -> Check:
    """Those that will be loaded, against what is free where they would lie. Raises SetupError."""
    gpus = probed.facts.get("torch", {}).get("gpus", [])
    on_gpu = bool(gpus) and options.device != "cpu"
    if on_gpu:
        where, free = "GPU memory", sum(one["free"] for one in gpus)
    else:
        where, free = "memory", probed.facts.get("memory", {}).get("free")
    precision = options.precision
    if precision == "auto":
        precision = written_precision(read_config(folder)) or ("bf16" if on_gpu else "fp32")
    size = sum(
        count * (4 if key.startswith(_ALWAYS_FP32) else _BYTES[precision])
        for key, count in counts_of(weight_files(folder))
        if options.speech or key.startswith(_HEARS_AND_WRITES)
    )
    found = f"{size / 2**30:.1f} GiB in {precision}"
    if free is None:
        return ok("weights", found)
    found += f"; {where} free: {free / 2**30:.1f} GiB"
    if size > free:
        fix = "Make room, or leave out what speaks with --no-speech."
        return warning("weights", found, fix if options.speech else "Make room.")
    return ok("weights", found)
