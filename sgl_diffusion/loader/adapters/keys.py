"""What a key of a file means: the component, the layer, and which part of the change it holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.loader.adapters.types import TRANSFORMER, TRANSFORMER_2


@dataclass(frozen=True)
class Key:
    """`component.layer` and the part, such as `down`; `flat` has underscores for dots in the layer.

    `prefix` is what the key began with, and `slot` the name of the adapter that PEFT puts into keys
    of a model that holds several.
    """

    component: str
    layer: str
    part: str
    flat: bool = False
    prefix: str = ""
    slot: str = ""


_SLOT = r"(?:\.(?P<slot>[\w-]+))?"
# The ends of keys and the part of a change that they hold, in every convention.
_PARTS = (
    (rf"\.lora_(?:A|down){_SLOT}\.weight", "down"),
    (rf"\.lora_(?:B|up){_SLOT}\.weight", "up"),
    (r"\.lora(?:_linear_layer)?\.down\.weight", "down"),
    (r"\.lora(?:_linear_layer)?\.up\.weight", "up"),
    # XLabs, and diffusers before PEFT: the layer itself ends so.
    (r"(?<=_lora)\.down\.weight|(?<=_lora[12])\.down\.weight", "down"),
    (r"(?<=_lora)\.up\.weight|(?<=_lora[12])\.up\.weight", "up"),
    (rf"\.lora_B{_SLOT}\.bias", "up_bias"),
    (r"\.alpha", "alpha"),
    (rf"\.dora_scale|\.lora_magnitude_vector{_SLOT}(?:\.weight)?", "magnitude"),
    (r"\.diff|\.w_norm", "diff"),
    (r"\.diff_b|\.b_norm", "diff_b"),
    *((rf"\.hada_{name}{_SLOT}", f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b")),
    *(
        (rf"\.lokr_{name}{_SLOT}", f"lokr_{name}")
        for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")
    ),
)

# Ends of keys that belong to methods this program does not know, and what they are.
_REFUSED = (
    (r"\.(?:hada_t[12]|lokr_t2|lora_mid\.weight)", "a Tucker decomposition of a convolution"),
    (r"\.oft_(?:blocks|diag|[rR])(?:\.[\w-]+)?(?:\.weight)?", "OFT"),
    (r"\.boft_\w+(?:\.[\w-]+)?", "BOFT"),
    (r"\.(?:a1|a2|b1|b2)\.weight", "GLoRA"),
    (r"\.ia3_l(?:\.[\w-]+)?|\.on_input", "IA3"),
    (r"\.vera_lambda_\w+(?:\.[\w-]+)?|vera_[AB](?:\.[\w-]+)?", "VeRA"),
    (r"\.lora_E(?:\.[\w-]+)?|\.ranknum(?:\.[\w-]+)?", "AdaLoRA"),
    (r"\.lora_embedding_[AB](?:\.[\w-]+)?", "LoRA of an embedding table"),
    (r"\.scalar", "a LyCORIS adapter with a trained scalar"),
    (r"\.set_weight|\.reshape_weight", "weights that replace or reshape those of the model"),
    (r"\.norm\.(?:query|key)_norm\.scale", "a FLUX control LoRA, which widens the model's input"),
    (r"\.lora_A(?:\.[\w-]+)?\.bias", "a bias inside the low-rank pair"),
    (r"\.(?:modules_to_save\.[\w-]+\.)?(?:weight|bias)", "whole weights beside or instead of LoRA"),
)

# Prefixes of dotted keys, and the component they mean. They may stand one inside another.
_DOTTED = {
    "base_model.model.": "",
    "model.diffusion_model.": TRANSFORMER,
    "diffusion_model.": TRANSFORMER,
    "transformer.": TRANSFORMER,
    "transformer_2.": TRANSFORMER_2,
    "unet.": TRANSFORMER,
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
}
_FLAT = {
    "lora_unet_": TRANSFORMER,
    "lora_transformer_": TRANSFORMER,
    "lycoris_": TRANSFORMER,
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}


def parse(key: str, prefixes: Mapping[str, str]) -> Key | None:
    """What a key means; None where its end is unknown. `prefixes` are further ones of a family,
    which win. A key of a method that cannot be used is an error that names the method."""
    for pattern, part in _PARTS:
        if match := re.search(rf"(?:{pattern})\Z", key, re.ASCII):
            slot = match.groupdict().get("slot") or ""
            return _placed(key[: match.start()], part, slot, prefixes)
    for pattern, what in _REFUSED:
        if re.search(rf"(?:{pattern})\Z", key, re.ASCII):
            raise RequestError(
                f"The file holds {what} ({shown(key)}), which is not supported.",
                hint="docs/lora.md lists the formats that are.",
                code="invalid_lora",
            )
    return None


def _placed(name: str, part: str, slot: str, prefixes: Mapping[str, str]) -> Key:
    flat = {**_FLAT, **{k: v for k, v in prefixes.items() if k.endswith("_")}}
    for prefix, component in flat.items():
        if name.startswith(prefix):
            return Key(component, name.removeprefix(prefix), part, True, prefix, slot)
    dotted = {**_DOTTED, **{k: v for k, v in prefixes.items() if k.endswith(".")}}
    component, found = "", ""
    while prefix := next((p for p in dotted if name.startswith(p)), ""):
        name, found = name.removeprefix(prefix), found + prefix
        component = dotted[prefix] or component
    return Key(component or TRANSFORMER, name, part, False, found, slot)


def shown(text: str) -> str:
    """A name of a file as it may stand in a message: short, and in one line."""
    clean = "".join(c if c.isprintable() else "?" for c in text)
    return clean if len(clean) <= 120 else clean[:117] + "..."


def some(names: list[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    rest = len(names) - most
    return ", ".join(map(shown, names[:most])) + (f" and {rest} more" if rest > 0 else "")
