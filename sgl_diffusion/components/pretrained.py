"""Loads components of other libraries: safetensors only, no weight left at a random value."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import torch

from sgl_diffusion.base.errors import SetupError
from sgl_diffusion.base.startup import spent_on
from sgl_diffusion.loader.absent import Places, load_or_leave
from sgl_diffusion.loader.files import weight_files
from sgl_diffusion.loader.index import Component, ModelIndex, read_config, read_json
from sgl_diffusion.loader.rules import Rule, Rules
from sgl_diffusion.loader.stored import StackedTensor, StoredTensor, stored_tensors

_SHOWN = 8
# While it loads, transformers takes the tying of weights out of its classes: two threads that load
# at a time could put it back in the wrong order, and no model would load any more.
_LOADING = threading.Lock()
_EXPERT = re.compile(
    r"(?P<place>.*\.experts)\.(?P<index>\d+)\.(?P<kind>gate|up|down)_proj\.weight", re.ASCII
)
# What attention in VAEs was called in the first versions of diffusers.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ATTENTION = "{part}.mid_block.attentions.{i}"
_VAE_NAMES = Rules(
    others=[Rules(*(Rule(f"{_ATTENTION}.{a}", f"{_ATTENTION}.{b}") for a, b in _OLD_NAMES.items()))]
)


def load_pretrained(
    kind: type[Any], part: Component, *, dtype: torch.dtype, device: torch.device
) -> Any:
    """`kind.from_pretrained` for inference, of a class of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = part.folder
    read_config(folder)
    files = weight_files(folder, part.variant)
    places = None if part.absences is None else Places(files, dtype)
    try:
        # Left to itself the library keeps all files mapped until it is done.
        with spent_on("weights"), _LOADING:
            model, report = kind.from_pretrained(
                None,
                config=kind.config_class.from_pretrained(folder, local_files_only=True),
                state_dict=stored_tensors(files) if places is None else places.state,
                dtype=dtype,
                output_loading_info=True,
            )
    except Exception as error:
        raise _unfit(folder, kind, error) from error
    model = _checked(model, report, folder, kind)
    if part.absences is not None and places is not None:
        part.absences.add(folder.name, model, places.put_down(model, device))
    return model.to(device)


def load_vae(kind: type[Any], part: Component, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The same of a class of diffusers, which left to itself has a model of random weights and all
    of the file beside each other."""
    config = read_config(part.folder)
    try:
        with torch.device("meta"):
            model = kind.from_config(config)
    except Exception as error:
        raise _unfit(part.folder, kind, error) from error
    load_or_leave(model, part, _VAE_NAMES, dtype=dtype, device=device)
    return model.requires_grad_(False)


def load_part(
    kind: type[Any],
    config: Any,
    folder: Path,
    prefix: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """The module `kind` whose weights have names that begin with `prefix` in a larger model."""
    stored = stored_tensors(weight_files(folder))
    mine = {key.removeprefix(prefix): stored[key] for key in stored if key.startswith(prefix)}
    try:
        with spent_on("weights"), _LOADING:
            model, report = kind.from_pretrained(
                None, config=config, state_dict=_fused(mine), dtype=dtype, output_loading_info=True
            )
    except Exception as error:
        raise _unfit(folder, kind, error) from error
    return _checked(model, report, folder, kind).to(device)


def _fused(found: dict[str, StoredTensor]) -> dict[str, StoredTensor | StackedTensor]:
    """Checkpoints have experts one by one, modules have them in one tensor. The library knows this
    of whole models only."""
    fused: dict[str, StoredTensor | StackedTensor] = {}
    experts: dict[str, dict[str, dict[int, StoredTensor]]] = {}
    for key, tensor in found.items():
        match = _EXPERT.fullmatch(key)
        if match is None:
            fused[key] = tensor
        else:
            kinds = experts.setdefault(match["place"], {"gate": {}, "up": {}, "down": {}})
            kinds[match["kind"]][int(match["index"])] = tensor
    for place, kinds in experts.items():
        gate, up, down = kinds["gate"], kinds["up"], kinds["down"]
        if gate.keys() == up.keys() == down.keys():  # else the report says what is missing
            order = sorted(gate)
            pairs = [[gate[index], up[index]] for index in order]
            fused[f"{place}.gate_up_proj"] = StackedTensor(pairs)
            fused[f"{place}.down_proj"] = StackedTensor([[down[index]] for index in order])
    return fused


def _unfit(folder: Path, kind: type[Any], error: Exception) -> SetupError:
    return SetupError(
        f"{folder} cannot be loaded as {kind.__name__} ({type(error).__name__}).",
        hint="Check that config.json and the weights belong together and are complete.",
        code="bad_checkpoint",
    )


def _checked(model: Any, report: dict[str, Any], folder: Path, kind: type[Any]) -> Any:
    """Left alone, the libraries draw what is missing at random and drop what they do not know."""
    problems = {what: sorted(report[f"{what}_keys"]) for what in ("missing", "unexpected")}
    if any(problems.values()):
        text = "; ".join(f"{what}: {_some(keys)}" for what, keys in problems.items() if keys)
        raise SetupError(
            f"The weights in {folder} do not fit {kind.__name__}: {text}.",
            hint="Check that config.json and the weights belong together and are complete.",
            code="bad_checkpoint",
        )
    return model.requires_grad_(False).eval()


def _some(keys: list[str]) -> str:
    rest = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def load_tokenizer(index: ModelIndex, name: str = "tokenizer", *, chat: bool = False) -> Any:
    """The tokenizer that a repository keeps in the folder `name`; `chat` asks for its template."""
    from transformers import AutoTokenizer

    folder = index.component(name).folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise SetupError(
            f"{folder} holds no tokenizer that can be loaded ({type(error).__name__}).",
            hint="Check that the download is complete.",
        ) from error
    if chat and not tokenizer.chat_template:
        raise SetupError(
            f"The tokenizer of {index.path} has no chat template.",
            hint="Check that the download is complete.",
        )
    return tokenizer


def load_preparation(kind: type[Any], index: ModelIndex, name: str) -> Any:
    """What prepares pictures for an encoder, with the settings in the folder `name`."""
    folder = index.component(name).folder
    values = read_json(folder / "preprocessor_config.json")
    try:
        return kind.from_dict(values)
    except Exception as error:
        raise SetupError(
            f"{folder} cannot prepare pictures ({type(error).__name__}).",
            hint="Check that the download is complete.",
        ) from error
